"""A graph in slices says what the whole graph says, reads each slice's weights once, and forgets what nobody reads."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from capa_export.export.graphs import graphs_in_fp32, write_onnx
from capa_export.model.checkpoint import open_checkpoint
from capa_export.model.families import load_family
from capa_export.model.prompt import Prompt, Prompter
from capa_export.model.source import Source
from capa_export.run.onnx import OnnxModel
from tests.conftest import noise
from tests.models import FAMILIES
from tests.products import once_each

TOKENS = [5, 6, 7]


class Made:
    """A small model's graphs, written and unwritten."""

    def __init__(self, family: str, folder: Path) -> None:
        small = FAMILIES[family]
        checkpoint = small.save_model(folder / "checkpoint", small.random_model())
        self.source = Source.of(open_checkpoint(str(checkpoint)), load_family(family))
        self.prompter = Prompter(checkpoint, checkpoint, self.source.family, self.source.dims)
        alpha = np.linspace(0.5, 1.5, self.source.dims.decoder.hidden_size, dtype=np.float32)
        self.options: Any = {"prune_layers": (1,), "scales": {2: alpha}, "selectors": {}, "min_keep_per_image": 1}
        self.folder = folder

    def written(self, precision: str) -> Path:
        folder = self.folder / precision
        if not folder.exists():
            write_onnx(self.source, precision, folder, **self.options)
        return folder

    def prompts(self) -> list[Prompt]:
        pictures = [noise(140, 112, 1), noise(112, 84, 2)]
        return [self.prompter("what color is the star ?", pictures[:count]) for count in (1, 2, 0)]


@pytest.fixture(params=FAMILIES, scope="module")
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(request.param, tmp_path_factory.mktemp("sliced"))


def answers(model: OnnxModel, prompts: list[Prompt]) -> list[tuple[np.ndarray, list[np.ndarray]]]:
    found: list[tuple[np.ndarray, list[np.ndarray]]] = []
    for prompt in prompts:
        run = model.prefill(prompt, [prompt.num_visual // 2])
        logits, cache = [run.logits], model.batch([run.cache], 3)
        for step, token in enumerate(TOKENS):
            output, cache = model.step(cache, token, prompt.next_position + step)
            logits.append(output)
        found.append((np.stack(logits), run.kept))
    return found


@pytest.mark.parametrize(
    ("made", "precision"), once_each(FAMILIES, ["fp32", "fp16", "bf16"]), indirect=["made"], scope="module"
)
def test_slices_are_the_whole(made: Made, precision: str) -> None:
    folder, prompts = made.written(precision), made.prompts()
    own, whole = answers(OnnxModel(folder, sliced=True), prompts), answers(OnnxModel(folder), prompts)
    for (logits, kept), (wanted, wanted_kept) in zip(own, whole, strict=True):
        for a, b in zip(kept, wanted_kept, strict=True):
            np.testing.assert_array_equal(a, b)
        # ONNX Runtime fuses across slices in the whole graph; FP16 values between them are rounded in both.
        np.testing.assert_allclose(
            logits, wanted, rtol=0, atol=(2e-3 if precision == "fp16" else 2e-6) * np.abs(wanted).max()
        )


def test_graphs_that_are_not_written_say_what_the_files_say(made: Made) -> None:
    graphs, prompts = graphs_in_fp32(made.source, **made.options), made.prompts()
    before = {*made.folder.rglob("*")}
    own, written = answers(OnnxModel(graphs), prompts), answers(OnnxModel(made.written("fp32"), sliced=True), prompts)
    for (logits, _), (wanted, _) in zip(own, written, strict=True):
        np.testing.assert_allclose(logits, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())
    assert {*made.folder.rglob("*")} - before <= {made.folder / "fp32", *(made.folder / "fp32").rglob("*")}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_an_output_that_is_kept_keeps_no_more_than_itself(tmp_path: Path) -> None:
    """Each layer makes 64 MB on the way to one number, which is kept to the end."""
    layers, columns = 8, 16_000_000
    model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 24}, name="sums"), ir_version=10)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1]))
    model.graph.inputs.append(x)
    for index in range(layers):
        size = ir.Value(name=f"size_{index}", const_value=ir.tensor(np.array([columns]), name=f"size_{index}"))
        model.graph.initializers.add(size)
        wide = ir.node("Expand", [x, size], name=f"model/layers.{index}/wide")
        total = ir.node("ReduceSum", wide.outputs, {"keepdims": 0}, name=f"model/layers.{index}/sum")
        total.outputs[0].name = f"y_{index}"
        total.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        model.graph.extend([wide, total])
        model.graph.outputs.append(total.outputs[0])
    ir.save(model, tmp_path / "sums.onnx")
    session = OnnxModel(tmp_path, sliced=True)._session("sums.onnx")
    before = _anonymous_bytes()
    found = session.run([f"y_{index}" for index in range(layers)], {"x": np.ones(1, np.float32)})
    assert [float(value) for value in found] == [columns] * layers
    assert _anonymous_bytes() - before < 2 * 4 * columns


def _anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
