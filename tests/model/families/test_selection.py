"""What vision towers say of their tokens: the graph against the Hugging Face tower, and who can be asked at all."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from PIL import Image

from capa_export.base.errors import CapaError
from capa_export.config.parts import parse_unit
from capa_export.export.bind import bind
from capa_export.model.checkpoint import open_checkpoint
from capa_export.model.families import SelectionFamily, load_family, require_selection
from capa_export.model.families.qwen25vl.dims import last_full_block
from capa_export.model.prompt import Prompt, Prompter, Turn, Video
from capa_export.model.source import Source
from capa_export.passes.fp32_parts import FP32PartsPass
from capa_export.trt.engines import build_graphs
from tests.conftest import noise
from tests.models import internvl3, llava15, qwen25vl
from tests.targets import one_gpu

QUESTION = "what color is the star ?"


@dataclass(frozen=True)
class Subject:
    """A small random model, in transformers and as its vision graph."""

    family: SelectionFamily
    model: Any
    source: Source
    folder: Path

    def prompt(self, *content: Any) -> Prompt:
        folder = self.source.checkpoint.folder
        return Prompter(folder, folder, self.family, self.source.dims).chat([Turn("user", [*content, QUESTION])])

    def graph(self, precision: str = "fp32", *, selection: bool = True, fp32: str | None = None) -> Path:
        dtype = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16}[precision]
        model = self.family.vision_model(self.source.dims.vision, dtype, selection=selection)
        if fp32 is not None:
            assert FP32PartsPass([parse_unit(fp32)])(model).modified
        path = self.folder / f"{precision}-{selection}.onnx"
        bind([model], self.source.tensors, dtype=dtype, data_path=path.with_suffix(".data"))
        ir.save(model, path)
        onnx.checker.check_model(str(path), full_check=True)
        return path

    def seen(self, prompt: Prompt, precision: str = "fp32", **options: Any) -> dict[str, np.ndarray]:
        """The graph's outputs by name, picture after picture."""
        session = onnxruntime.InferenceSession(str(self.graph(precision, **options)))
        names = [output.name for output in session.get_outputs()]
        dtype = {"fp32": np.float32, "fp16": np.float16}[precision]
        runs = [session.run(None, {"pixel_values": each.patches.astype(dtype)}) for each in prompt.pictures]
        return {name: np.concatenate(parts) for name, parts in zip(names, zip(*runs, strict=True), strict=True)}

    def eager(self, prompt: Prompt) -> tuple[np.ndarray, np.ndarray]:
        with torch.no_grad():
            saliency, features = self.family.eager_selection(self.model, prompt)
        assert saliency.dtype == torch.float32
        return saliency.numpy(), features.numpy()


Make = Callable[..., Subject]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A subject of a module that has `random_model` and `save_model`."""
    made: dict[str, Subject] = {}

    def subject(module: ModuleType, **options: Any) -> Subject:
        name = module.__name__.rpartition(".")[2]
        key = f"{name} {options}"
        if key not in made:
            folder = tmp_path_factory.mktemp(name)
            model = module.random_model(**options)
            family = load_family(name)
            assert isinstance(family, SelectionFamily)
            source = Source.of(open_checkpoint(str(module.save_model(folder / "checkpoint", model))), family)
            made[key] = Subject(family, model, source, folder)
        return made[key]

    return subject


def check(subject: Subject, prompt: Prompt) -> None:
    """The graph says what the Hugging Face tower says."""
    given, (saliency, features) = subject.seen(prompt), subject.eager(prompt)
    assert list(given) == ["image_features", "saliency", "tower_features"]
    assert given["saliency"].shape == saliency.shape == (prompt.num_visual,)
    assert given["saliency"].dtype == np.float32
    assert len(given["image_features"]) == len(given["tower_features"]) == prompt.num_visual
    # FP32 sums in another order.
    np.testing.assert_allclose(given["saliency"], saliency, rtol=1e-5)
    np.testing.assert_allclose(given["tower_features"], features, rtol=0, atol=1e-5 * np.abs(features).max())
    np.testing.assert_array_equal(given["image_features"], subject.seen(prompt, selection=False)["image_features"])
    assert np.ptp(saliency) > 0.1 * saliency.mean(), "no token stands out: a wrong order would pass"


LLAVA = {
    "one before the last": {},
    "last": {"vision_feature_layer": -1},
    "counted from the first": {"vision_feature_layer": 1},
}


@pytest.mark.parametrize("options", LLAVA.values(), ids=LLAVA)
def test_llava_is_what_the_class_token_pays_to_patches(make: Make, options: dict[str, Any]) -> None:
    subject = make(llava15, **options)
    prompt = subject.prompt(noise(56, 56, 1), noise(90, 60, 2))
    check(subject, prompt)
    pictures = subject.seen(prompt)["saliency"].reshape(2, -1)
    assert (pictures.sum(axis=1) < 1).all(), "the rest is what it pays to itself"


def test_a_class_token_that_is_a_visual_token_has_a_saliency_too(make: Make) -> None:
    subject = make(llava15, vision_feature_select_strategy="full")
    prompt = subject.prompt(noise(56, 56, 1), noise(90, 60, 2))
    check(subject, prompt)
    whole = subject.seen(prompt)["saliency"].reshape(2, -1)
    patches = make(llava15).seen(prompt)["saliency"].reshape(2, -1)
    np.testing.assert_array_equal(whole[:, 1:], patches)
    np.testing.assert_allclose(whole.sum(axis=1), 1, rtol=1e-6)


INTERNVL = {
    "layer norms": {},
    "6B's norms": {"vision": {"norm_type": "rms_norm", "use_qk_norm": True, "attention_bias": False}},
    "final norm": {"vision": {"use_mean_pooling": False}},
}


@pytest.mark.parametrize("options", INTERNVL.values(), ids=INTERNVL)
def test_internvl_is_what_the_class_token_pays_to_squares(make: Make, options: dict[str, Any]) -> None:
    subject = make(internvl3, **options)
    prompt = subject.prompt(noise(56, 56, 1), noise(170, 60, 2))
    assert [len(picture.patches) for picture in prompt.pictures] == [1, 4]
    assert [(picture.grid, picture.tile) for picture in prompt.pictures] == [((2, 2), (2, 2)), (None, (2, 2))]
    check(subject, prompt)
    tiles = subject.seen(prompt)["saliency"].reshape(5, 4)
    assert (4 * tiles.sum(axis=1) < 1).all(), "the rest is what it pays to itself"


QWEN: dict[str, Sequence[Image.Image | Video]] = {
    "one window": [noise(112, 112)],
    "no multiple of a window": [noise(140, 196)],
    "narrower than a window": [noise(28, 364)],
    "two": [noise(56, 84, 1), noise(140, 280, 2)],
    "video between pictures": [
        noise(84, 56, 7),
        Video([noise(140, 112, seed) for seed in range(5)], 2.0),
        noise(56, 112, 8),
    ],
}


@pytest.mark.parametrize("shown", QWEN.values(), ids=QWEN)
def test_qwen_is_what_a_patch_receives_from_its_frame(make: Make, shown: list[Any]) -> None:
    subject = make(qwen25vl)
    prompt = subject.prompt(*shown)
    check(subject, prompt)
    saliency = subject.seen(prompt)["saliency"]
    for picture in prompt.pictures:
        frames, rows, cols = picture.patches.shape[:3]
        of_picture, saliency = np.split(saliency, [picture.num_tokens])
        np.testing.assert_allclose(of_picture.reshape(frames, -1).mean(axis=1) * rows * cols * 4, 1, rtol=1e-5)


def test_qwen_takes_the_last_block_that_sees_whole_frames() -> None:
    assert last_full_block((7, 15, 23, 31), 32) == 31
    assert last_full_block((0, 2, 5), 4) == 2, "what lies behind the tower is no block"
    with pytest.raises(CapaError, match="fullatt_block_indexes: names no block"):
        last_full_block((), 32)


@pytest.mark.parametrize("block", [0, 1])
def test_windowed_blocks_behind_it_do_not_count(make: Make, tmp_path: Path, block: int) -> None:
    model: Any = qwen25vl.random_model()
    model.config.vision_config.fullatt_block_indexes = [block]
    model.model.visual.fullatt_block_indexes = [block]
    folder = qwen25vl.save_model(tmp_path / "checkpoint", model)
    family = make(qwen25vl).family
    subject = Subject(family, model, Source.of(open_checkpoint(str(folder)), family), tmp_path)
    check(subject, subject.prompt(noise(140, 196)))


ALL = pytest.mark.parametrize("module", [llava15, internvl3, qwen25vl], ids=["llava15", "internvl3", "qwen25vl"])


def check_half(given: dict[str, np.ndarray], saliency: np.ndarray, features: np.ndarray) -> None:
    """Two units of FP16's last place: what queries, keys and features are rounded to, in three blocks."""
    np.testing.assert_allclose(given["saliency"], saliency, rtol=2e-3)
    np.testing.assert_allclose(given["tower_features"], features, rtol=0, atol=2e-3 * np.abs(features).max())


@ALL
def test_half_precision_says_nearly_the_same(make: Make, module: ModuleType) -> None:
    subject = make(module)
    prompt = subject.prompt(noise(140, 196))
    given, (saliency, features) = subject.seen(prompt, "fp16"), subject.eager(prompt)
    assert given["saliency"].dtype == np.float32
    assert given["tower_features"].dtype == np.float16
    check_half(given, saliency, features)


@ALL
@pytest.mark.parametrize("part", ["attn", "residual"])
def test_an_island_of_fp32_takes_it_along(make: Make, module: ModuleType, part: str) -> None:
    subject = make(module)
    prompt = subject.prompt(noise(140, 196))
    last = subject.source.dims.vision.num_blocks - 1
    unit = "visual.residual" if part == "residual" else f"visual.{last}.attn"
    given, (saliency, features) = subject.seen(prompt, "fp16", fp32=unit), subject.eager(prompt)
    check_half(given, saliency, features)
    model = ir.load(subject.graph("fp16", fp32=f"visual.{last}.attn"))
    scored = [node for node in model.graph if node.op_type == "MeanAttention"]
    assert {value.dtype for node in scored for value in node.inputs[:2] if value is not None} == {ir.DataType.FLOAT}


@ALL
def test_without_pictures_there_is_nothing_to_say(make: Make, module: ModuleType) -> None:
    subject = make(module)
    saliency, features = subject.eager(subject.prompt())
    _, size = subject.eager(subject.prompt(noise(56, 56)))[1].shape
    assert saliency.shape == (0,)
    assert features.shape == (0, size)


@ALL
def test_it_adds_nodes_and_no_weights(make: Make, module: ModuleType) -> None:
    family, dims = make(module).family, make(module).source.dims.vision
    more, plain = (
        family.vision_model(dims, ir.DataType.FLOAT16, selection=selection).graph for selection in (True, False)
    )
    weights, wanted = (
        {name for name, value in graph.initializers.items() if value.const_value is None} for graph in (more, plain)
    )
    assert weights == wanted
    assert {node.name for node in plain} < {node.name for node in more}
    assert [output.name for output in plain.outputs] == ["image_features"]


@pytest.mark.trt
@ALL
def test_tensorrt_builds_it(make: Make, module: ModuleType) -> None:
    subject = make(module)
    graph, out = subject.graph("fp16"), subject.folder / "engines"
    build_graphs(graph.parent, {graph.name: "visual"}, out, one_gpu(), weights="embedded")
    layers = json.loads((out / "visual.layers.json").read_text(encoding="utf-8"))
    outputs = {tensor["name"]: tensor["dtype"] for layer in layers for tensor in layer["outputs"]}
    assert outputs.items() >= {"image_features": "Half", "saliency": "Float", "tower_features": "Half"}.items()


def test_a_family_whose_tower_does_not_say_is_refused() -> None:
    assert require_selection(load_family("llava15"), "vispruner") is load_family("llava15")
    with pytest.raises(CapaError, match="selector vispruner needs the vision tower's attention, which Qwen3VL"):
        require_selection(load_family("qwen3vl"), "vispruner")
