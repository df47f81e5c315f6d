"""FP16 attention in FP32 for the versions of ONNX Runtime that sum it in FP16."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from capa_export.export.graphs import write_onnx
from capa_export.model.prompt import Prompter
from capa_export.model.source import Source
from capa_export.passes.wide_attention import WideAttentionPass
from capa_export.run import onnx as onnx_model
from capa_export.run.onnx import OnnxModel
from tests.conftest import noise

FILES = ("llm/prefill.onnx", "llm/decode.onnx", "visual/model.onnx")


@pytest.fixture(scope="module", params=["fp16", "fp32"])
def graphs(request: pytest.FixtureRequest, source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    write_onnx(source, request.param, folder, prune_layers=(2,), scales={})
    return folder


@pytest.mark.parametrize("file", FILES)
def test_attention_alone_changes_and_every_value_keeps_its_name(graphs: Path, file: str) -> None:
    model = ir.load(graphs / file)
    before = {value.name: value.dtype for node in model.graph for value in node.outputs}
    half = graphs.name.startswith("fp16")
    assert WideAttentionPass()(model).modified == half
    after = {value.name: value.dtype for node in model.graph for value in node.outputs}
    assert before.items() <= after.items()
    nodes = [node for node in model.graph if node.op_type == "Attention"]
    assert nodes and {node.inputs[0].dtype for node in nodes if node.inputs[0]} == {ir.DataType.FLOAT}
    onnx.shape_inference.infer_shapes(ir.to_proto(model), check_type=True, strict_mode=True)


@pytest.mark.parametrize(("version", "wide"), [("1.24.4", True), ("1.25.0", False), ("1.31.1", False)])
def test_only_an_older_runtime_gets_it(
    graphs: Path,
    prompter: Prompter,
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    *,
    wide: bool,
) -> None:
    prompt, called = prompter("what color is the star ?", [noise(112, 84)]), list[str]()
    expected = OnnxModel(graphs, threads=1).prefill(prompt, [4])

    def call(self: WideAttentionPass, model: ir.Model) -> ir.passes.PassResult:
        called.append(str(model.graph.name))
        return original(self, model)

    original = WideAttentionPass.call
    monkeypatch.setattr(WideAttentionPass, "call", call)
    monkeypatch.setattr(onnx_model, "_runtime_version", lambda: version)
    found = OnnxModel(graphs, threads=1).prefill(prompt, [4])
    assert bool(called) == wide
    assert np.array_equal(found.kept[0], expected.kept[0])
    # FP16 rounds in two places more.
    tolerance = 4e-3 if graphs.name.startswith("fp16") else 1e-6
    np.testing.assert_allclose(found.logits, expected.logits, rtol=0, atol=tolerance * np.abs(expected.logits).max())
