"""Qwen2.5-VL's vision tower, positions and prompts against transformers, and the golden graphs."""

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from capa_export.base.errors import CapaError
from capa_export.base.toml import shipped
from capa_export.config.recipe import load_recipe
from capa_export.export.graphs import write_onnx
from capa_export.graph.decoder import decode_model, prefill_model
from capa_export.graph.rotary import rotary_tables
from capa_export.model.checkpoint import fetch_config
from capa_export.model.families import qwen25vl
from capa_export.model.prompt import Picture, Prompter
from capa_export.model.source import Source
from capa_export.run.onnx import OnnxModel
from tests.conftest import noise

GRIDS = [(1, 16, 16), (1, 10, 14), (1, 18, 22), (3, 8, 8), (1, 2, 2), (2, 6, 30), (1, 40, 4), (1, 2, 38)]


@pytest.fixture(scope="module")
def onnx(source: Source, tmp_path_factory: pytest.TempPathFactory) -> OnnxModel:
    folder = tmp_path_factory.mktemp("onnx")
    write_onnx(source, "fp32", folder, prune_layers=(2,), scales={})
    return OnnxModel(folder, threads=1)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_vision_tower_equals_transformers(model: Any, onnx: OnnxModel, grid: tuple[int, int, int]) -> None:
    frames, rows, cols = grid
    patches = torch.randn(frames * rows * cols, 1176, generator=torch.Generator().manual_seed(rows))
    with torch.no_grad():
        parts = model.model.get_image_features(patches, torch.tensor([grid])).pooler_output
    expected = torch.cat(list(parts)).numpy()
    features = onnx.see(Picture(patches.numpy().reshape(frames, rows // 2, cols // 2, 4, 1176), len(expected)))
    np.testing.assert_allclose(features, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


PICTURES = {"one": [noise(224, 112)], "two": [noise(56, 84), noise(140, 280)], "none": []}


@pytest.mark.parametrize("pictures", PICTURES.values(), ids=PICTURES)
def test_positions_equal_transformers(model: Any, prompter: Prompter, pictures: list[Any]) -> None:
    prompt = prompter("what color is the star ?", pictures)
    _, expected = qwen25vl.eager_inputs(model, prompt)
    np.testing.assert_array_equal(prompt.position_ids, expected[:, 0].numpy())
    assert prompt.next_position == int(expected.max()) + 1


def test_prompt_follows_the_chat_template(prompter: Prompter) -> None:
    prompt = prompter("what color is the star ?", [noise(56, 84)])
    text = prompter.tokenizer.decode(prompt.input_ids[~prompt.is_visual])
    assert text.replace(" ", "").startswith("<|im_start|>user\n<|vision_start|><|vision_end|>what")
    assert prompt.num_visual == 6
    assert prompt.pictures[0].patches.shape == (1, 3, 2, 4, 1176)


def test_picture_that_does_not_match_its_place_is_refused(prompter: Prompter) -> None:
    with pytest.raises(CapaError, match="1 pictures, but the prompt has 2 places"):
        prompter("what is <|image_pad|> ?", [noise(56, 56)])


def test_graph_names_lead_to_the_layer(source: Source) -> None:
    rotary = rotary_tables(source.dims)
    model = prefill_model(source.dims.decoder, ir.DataType.FLOAT16, rotary, prune_layers=(2,), linear_layers=(1,))
    names = [node.name for node in model.graph]
    assert len(names) == len(set(names))
    for name in (
        "model/layers.4/self_attn/q_proj/Gemm",
        "model/layers.2/prune/ContributionScore",
        "model/layers.2/prune/TopKKeep",
        "model/layers.1/VisualScale",
        "lm_head/Gemm",
    ):
        assert name in names
    assert {node.op_type for node in model.graph if node.domain == "capa"} == {f.name for f in model.functions.values()}
    assert "NonZero" not in {node.op_type for node in model.graph}


def test_goldens(request: pytest.FixtureRequest) -> None:
    """The graphs of the shipped tiny model, as text without weights: they change only on purpose."""
    recipe = load_recipe("tiny-qwen25vl")
    dims, half = qwen25vl.model_dims(fetch_config(recipe.checkpoint)), ir.DataType.FLOAT16
    rotary, layers = rotary_tables(dims), [stage.layer for stage in recipe.prune.schedule]
    # The layers that calibration on the built-in scenes finds linear.
    linear = range(1, dims.decoder.num_layers)
    models = {
        "prefill": prefill_model(dims.decoder, half, rotary, prune_layers=layers, linear_layers=linear),
        "decode": decode_model(dims.decoder, half, rotary, prune_layers=layers),
        "visual": qwen25vl.vision_model(dims.vision, half),
    }
    for name, model in models.items():
        path = shipped("graphs") / "goldens" / recipe.name / f"{name}.onnxtxt"
        text = ir.to_onnx_text(model, exclude_initializers=True) + "\n"
        if request.config.getoption("--update-goldens"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert text == path.read_text(encoding="utf-8"), f"{path} differs: pytest --update-goldens if meant"
