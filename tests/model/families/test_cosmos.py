"""NVIDIA's Cosmos-Reason checkpoints: Qwen's architectures, with configs as transformers wrote them in their time."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from capa_export.bundle.store import Bundle
from capa_export.model.families import load_family
from capa_export.model.generation import eos_token_ids
from capa_export.model.recipe_choice import find_recipe
from capa_export.model.tensors import check_tensors
from tests.building import Building
from tests.conftest import noise
from tests.models import FAMILIES

QUESTION = "what color is the star ?"


def reason1(folder: Path) -> Path:
    """Cosmos-Reason1-7B: the flat config of transformers 4.50 with what training left in it, and pixel bounds."""
    FAMILIES["qwen25vl"].save_model(folder, FAMILIES["qwen25vl"].random_model(), save_original_format=True)
    config = json.loads((folder / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    flat = {
        **config,
        **{key: value for key, value in text.items() if key not in ("model_type", "layer_types", "dtype")},
        "rope_scaling": {"mrope_section": rope["mrope_section"], "rope_type": "default", "type": "default"},
        "rope_theta": rope["rope_theta"],
        "sliding_window": 32768,
        "max_window_layers": 28,
        "use_sliding_window": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0",
        "use_cache": False,
        "eos_token_id": 1,
    }
    flat.pop("dtype", None)
    flat["vision_config"].pop("rope_parameters", None)
    # Beside `in_channels`, which transformers reads, the first Qwen2-VL's name for it.
    flat["vision_config"] |= {"in_chans": 3, "spatial_patch_size": flat["vision_config"]["patch_size"]}
    (folder / "config.json").write_text(json.dumps(flat))
    rewrite_processor(folder, image_processor_type="Qwen2VLImageProcessor", processor_class="Qwen2_5_VLProcessor")
    return folder


def reason2(folder: Path) -> Path:
    """Cosmos-Reason2: the config of transformers 4.57, `rope_scaling` beside `rope_theta`, fast image processor."""
    FAMILIES["qwen3vl"].save_model(folder, FAMILIES["qwen3vl"].random_model())
    config = json.loads((folder / "config.json").read_text())
    rope = config["text_config"].pop("rope_parameters")
    config["text_config"] |= {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": rope["mrope_section"], "rope_type": "default"},
        "eos_token_id": 1,
        "dtype": "bfloat16",
    }
    config["vision_config"].pop("rope_parameters", None)
    config["transformers_version"] = "4.57.1"
    (folder / "config.json").write_text(json.dumps(config))
    rewrite_processor(folder, image_processor_type="Qwen2VLImageProcessorFast", processor_class="Qwen3VLProcessor")
    return folder


def rewrite_processor(folder: Path, **changes: Any) -> None:
    path = folder / "preprocessor_config.json"
    given = json.loads(path.read_text())
    path.write_text(json.dumps({**given, **changes, "device": None, "return_tensors": None, "disable_grouping": None}))
    (folder / "generation_config.json").unlink()


CHECKPOINTS = {"Cosmos-Reason1": (reason1, "qwen25vl"), "Cosmos-Reason2": (reason2, "qwen3vl")}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_it_is_read_as_its_architecture(name: str, tmp_path: Path) -> None:
    write, family = CHECKPOINTS[name]
    folder = write(tmp_path / "cosmos")
    plain = FAMILIES[family].save_model(tmp_path / "qwen", FAMILIES[family].random_model())
    recipe = find_recipe(str(folder))
    assert recipe.family == family and any(name in published for published in recipe.published)
    buildings = [Building.of(recipe, Bundle(tmp_path / "out"), one) for one in (folder, plain)]
    cosmos, qwen = buildings
    assert cosmos.model.source.dims == qwen.model.source.dims
    check_tensors(cosmos.model.source)
    prompts = [building.model.prompter(QUESTION, [noise(140, 196), noise(84, 84, 1)]) for building in buildings]
    np.testing.assert_array_equal(prompts[0].input_ids, prompts[1].input_ids)
    for theirs, ours in zip(prompts[1].pictures, prompts[0].pictures, strict=True):
        np.testing.assert_array_equal(ours.patches, theirs.patches)
    logits: list[torch.Tensor] = []
    for building, prompt in zip(buildings, prompts, strict=True):
        with torch.no_grad():
            embeds, position_ids, *_ = load_family(family).eager_inputs(building.model.eager, prompt)
            text = building.model.eager.model.language_model(inputs_embeds=embeds, position_ids=position_ids)
        logits.append(text.last_hidden_state)
    assert torch.equal(*logits)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_answers_end_where_config_json_says(name: str, tmp_path: Path) -> None:
    assert eos_token_ids(CHECKPOINTS[name][0](tmp_path)) == [1]
