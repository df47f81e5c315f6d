"""What ONNX Runtime makes of weights of few bits where their products are computed in FP32."""

from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime
import pytest

from capa_export.export.graphs import Graphs, graphs_in_fp32, write_onnx
from capa_export.model.checkpoint import open_checkpoint
from capa_export.model.families import load_family
from capa_export.model.prompt import Prompter
from capa_export.model.source import Source
from capa_export.run.onnx import OnnxModel
from tests.conftest import noise
from tests.models import FAMILIES


@pytest.mark.parametrize("where", ["whole", "sliced", "not written"])
@pytest.mark.parametrize("weights", ["int4:32/rtn", "int8", "fp8"])
def test_no_run_dequantizes_a_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str, where: str) -> None:
    family = FAMILIES["qwen25vl"]
    checkpoint = family.save_model(tmp_path / "checkpoint", family.random_model())
    source = Source.of(open_checkpoint(str(checkpoint)), load_family("qwen25vl"), weights)
    options: dict[str, Any] = {"prune_layers": (1,), "scales": {}, "selectors": {}, "min_keep_per_image": 1}
    if where == "not written":
        graphs: Path | Graphs = graphs_in_fp32(source, **options)
    else:
        write_onnx(source, "fp16", graphs := tmp_path / "graphs", **options)
    prompt = Prompter(checkpoint, checkpoint, source.family, source.dims)("what is it ?", [noise(140, 112, 1)])

    connect, opened = onnxruntime.InferenceSession, list[Path]()

    def session(graph: Any, options: onnxruntime.SessionOptions, **rest: Any) -> onnxruntime.InferenceSession:
        opened.append(tmp_path / f"{len(opened)}.onnx")
        options.optimized_model_filepath = str(opened[-1])
        return connect(graph, options, **rest)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    model = OnnxModel(graphs, sliced=where != "whole")
    run = model.prefill(prompt, [prompt.num_visual // 2])
    model.step(model.batch([run.cache], 1), 5, prompt.next_position)

    operators = [node.op_type for path in opened for node in ir.load(path).graph]
    assert "DequantizeLinear" not in operators
    assert ("MatMulNBits" in operators) == weights.startswith("int4")
