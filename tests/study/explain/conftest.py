"""A small bundle to explain, and one whose model has sinks."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from capa_export.bundle.store import Bundle
from capa_export.config.recipe import Recipe, load_recipe
from capa_export.model.eager import Eager
from capa_export.model.eager_plan import EagerInputs, EagerPlan
from capa_export.model.families import qwen25vl
from capa_export.model.prompt import Prompter
from capa_export.study.explain.stage import explain
from tests.building import Building
from tests.conftest import noise
from tests.models.qwen25vl import random_model, save_model

QUESTION = "What is it?"
DUMP, ANCHOR = 7, 12
"""Visual tokens that the planted model makes sinks of."""


def recipe_of(*, eta: float = 0.5, **prune: Any) -> Recipe:
    """The shipped one, made small; random weights are linear nowhere near 0.96."""
    data = load_recipe("qwen25vl").model_dump()
    data["prune"] = {"schedule": [{"layer": 2, "ratio": 0.75}], **prune}
    data["ffn"] = {"eta": eta, "budget": 100}
    data["calibration"] = {"samples": 1, "prompt": QUESTION}
    return Recipe(**data)


def build(folder: Path, checkpoint: Path, pictures: Path, recipe: Recipe, *, ffn: bool = True) -> Path:
    """All of a bundle that explaining needs."""
    made = Building.of(recipe, Bundle(folder), checkpoint, images=pictures, precision="fp32", ffn=ffn)
    if ffn:
        made.calibrate()
    made.export()
    return folder


def building_of(bundle: Path) -> Building:
    return Building.recorded(Bundle.open(bundle))


def explained(building: Building, pictures: Sequence[Path], *rest: Any, **options: Any) -> Any:
    return explain(building.model, building.bundle, pictures, *rest, **options)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 4 x 5 visual tokens, and of 3 x 2; the first alone in a folder of its own."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "one").mkdir()
    noise(140, 112).save(folder / "one" / "wide.png")
    noise(56, 84, 1).save(folder / "tall.png")
    return folder


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, pictures: Path) -> Path:
    return build(tmp_path_factory.mktemp("explained") / "out", checkpoint, pictures / "one", recipe_of())


@pytest.fixture(scope="session")
def plain_bundle(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, pictures: Path) -> Path:
    """Without a calibration, and pruned before the decoder."""
    recipe = recipe_of(schedule=[{"ratio": 0.5, "selector": "divprune"}])
    return build(tmp_path_factory.mktemp("explained") / "out", checkpoint, pictures, recipe, ffn=False)


@pytest.fixture(scope="session")
def sink_bundle(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    folder = tmp_path_factory.mktemp("sinks")
    model = _wide_model()
    save_model(folder / "checkpoint", model)
    _plant_sinks(model, folder / "checkpoint", pictures / "one" / "wide.png")
    checkpoint = save_model(folder / "checkpoint", model)
    # A scale in place of the FFN that makes the sinks would make them of other tokens.
    return build(folder / "out", checkpoint, pictures / "one", recipe_of(eta=0.999))


def _wide_model() -> Any:
    """phi is at most the root of the hidden size, so that only a wide model can have sinks."""
    config = copy.deepcopy(random_model().config)
    config.text_config.hidden_size = config.vision_config.out_hidden_size = 512
    config.text_config.num_attention_heads, config.text_config.num_key_value_heads = 32, 16
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.6 * parameter[0].numel() ** -0.5)
    return model


@torch.no_grad()
def _plant_sinks(model: Any, checkpoint: Path, picture: Path) -> None:
    """Two neurons of the first FFN fire at one visual token each, on a channel of its own.

    Layer 2 sees no value in the channel of the one, and much in that of the other.
    """
    from PIL import Image

    from capa_export.model.checkpoint import open_checkpoint
    from capa_export.model.source import Source

    dims = Source.of(open_checkpoint(str(checkpoint)), qwen25vl).dims
    prompt = Prompter(checkpoint, checkpoint, qwen25vl, dims)(QUESTION, [Image.open(picture).convert("RGB")])
    layers, seen = model.model.language_model.layers, []
    handle = layers[0].mlp.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0][0]))
    inputs = EagerInputs.of(qwen25vl.eager_inputs(model, prompt))
    Eager(model).prefill(inputs, torch.from_numpy(prompt.is_visual), EagerPlan())
    handle.remove()
    rows = prompt.is_visual.nonzero()[0]
    inverse_DT = torch.linalg.pinv(seen[0])
    ffn, values = layers[0].mlp, layers[2].self_attn.v_proj
    values.bias.zero_()
    for neuron, (token, channel, value) in enumerate(((DUMP, 5, 0.0), (ANCHOR, 9, 3.0))):
        ffn.gate_proj.weight[neuron] = ffn.up_proj.weight[neuron] = 50 * inverse_DT[:, rows[token]]
        ffn.down_proj.weight[:, neuron] = 0
        ffn.down_proj.weight[channel, neuron] = 10
        values.weight[:, channel] *= value
