"""InternVL3 in its authors' layout against its twin that transformers saved: the same tensors, prompts and tiles."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import InternVLConfig, InternVLForConditionalGeneration

from capa_export.base.errors import CapaError
from capa_export.bundle.store import Bundle
from capa_export.config.recipe import load_recipe
from capa_export.model.checkpoint import open_checkpoint
from capa_export.model.families import internvl3
from capa_export.model.generation import eos_token_ids
from capa_export.model.prompt import Prompter
from capa_export.model.sidecars import copy_sidecars
from capa_export.model.source import Source
from capa_export.model.tensors import check_tensors
from capa_export.plan.flops import parameters
from tests.building import Building
from tests.conftest import noise
from tests.model.families.test_internvl3 import SIZES, VARIANTS, published
from tests.models.internvl3 import QWEN3, original_config, random_model, save_model, save_original

MODELS: dict[str, dict[str, Any]] = {
    "InternVL3": {},
    "InternVL3.5": {"text": QWEN3},
    "6B tower": {"vision": VARIANTS["6B tower"]},
    "tied": {"tie": True},
}


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS)
def twins(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One model in the layout of transformers, and in that of its authors."""
    folder, model = tmp_path_factory.mktemp("twins"), random_model(**request.param)
    return save_model(folder / "hf", model), save_original(folder / "original", model)


def opened(folder: Path) -> Source:
    return Source.of(open_checkpoint(str(folder)), internvl3)


def building_of(folder: Path, out: Path) -> Building:
    return Building.of(load_recipe("internvl3"), Bundle(out), folder)


def content(source: Source) -> dict[str, list[bytes]]:
    return {name: [part.tobytes() for part in tensor.chunks()] for name, tensor in source.tensors.items()}


def test_dimensions_and_tensors_are_the_twins(twins: tuple[Path, Path]) -> None:
    hf, original = map(opened, twins)
    assert original.dims == hf.dims
    check_tensors(original)
    assert {name: tensor.shape for name, tensor in original.tensors.items()} == {
        name: tensor.shape for name, tensor in hf.tensors.items()
    }
    assert content(original) == content(hf)
    assert original.checkpoint.num_parameters == hf.checkpoint.num_parameters


def test_weights_stay_in_the_shard(twins: tuple[Path, Path]) -> None:
    shard = twins[1] / "model.safetensors"
    assert {tensor.path for tensor in opened(twins[1]).tensors.values()} == {shard}
    assert opened(twins[1]).checkpoint.files == [twins[1] / "config.json", shard]


PICTURES = {"one tile": [noise(56, 56)], "several": [noise(112, 168, 1), noise(170, 56, 3)], "none": []}


@pytest.mark.parametrize("pictures", PICTURES.values(), ids=PICTURES)
def test_prompts_and_eager_logits_are_the_twins(twins: tuple[Path, Path], tmp_path: Path, pictures: list[Any]) -> None:
    logits: list[torch.Tensor] = []
    prompts: list[Any] = []
    for folder in twins:
        building = building_of(folder, tmp_path / folder.name)
        prompts.append(building.model.prompter("what color is the star ?", pictures))
        with torch.no_grad():
            embeds, position_ids = internvl3.eager_inputs(building.model.eager, prompts[-1])
            logits.append(building.model.eager(inputs_embeds=embeds, position_ids=position_ids).logits)
    hf, original = prompts
    np.testing.assert_array_equal(original.input_ids, hf.input_ids)
    for theirs, ours in zip(hf.pictures, original.pictures, strict=True):
        np.testing.assert_array_equal(ours.patches, theirs.patches)
    assert torch.equal(*logits)


def test_a_bundle_reads_it_as_its_twin(twins: tuple[Path, Path], tmp_path: Path) -> None:
    source = opened(twins[1])
    copy_sidecars(source.checkpoint, tmp_path)
    config = json.loads((tmp_path / "llm" / "config.json").read_text())
    assert internvl3.model_dims(config) == source.dims
    assert InternVLConfig.from_pretrained(tmp_path / "llm").text_config.vocab_size == source.dims.decoder.vocab_size
    assert eos_token_ids(tmp_path / "llm") == [3]
    prompter = Prompter(tmp_path / "llm", tmp_path / "visual", internvl3, source.dims)
    assert prompter("what color is the star ?", [noise(56, 56)]).num_visual == 4


def test_tiles_are_as_many_as_its_config_says(tmp_path: Path) -> None:
    folder = save_original(tmp_path / "original", random_model(), max_dynamic_patch=4)
    prompt = building_of(folder, tmp_path / "out").model.prompter("what color is the star ?", [noise(224, 112)])
    # Two tiles and the thumbnail; twelve would allow eight.
    assert len(prompt.pictures[0].patches) == 3


@pytest.mark.parametrize("size", SIZES)
def test_published_dimensions(size: str) -> None:
    hf = published(size)
    config = InternVLConfig(**hf, tie_word_embeddings=False)
    original = original_config(config)
    assert internvl3.model_dims(original) == internvl3.model_dims({**hf, "tie_word_embeddings": False})
    with torch.device("meta"):
        model = InternVLForConditionalGeneration(config)
    assert parameters(internvl3.model_dims(original)).total == sum(value.numel() for value in model.parameters())


REFUSED = {
    "InternLM": ({"llm_config.model_type": "internlm3"}, "llm_config.model_type: is 'internlm3', and the graphs hold"),
    "experts": ({"llm_config.model_type": "qwen3_moe"}, "llm_config.model_type: is 'qwen3_moe', and the graphs hold"),
    "gpt-oss": ({"llm_config.model_type": "gpt_oss"}, "llm_config.model_type: is 'gpt_oss', and the graphs hold"),
    "by its class": (
        {"llm_config.model_type": None, "llm_config.architectures": ["InternLM2ForCausalLM"]},
        "llm_config.model_type: is 'internlm2', and the graphs hold",
    ),
    "no decoder": (
        {"llm_config.model_type": None, "llm_config.architectures": []},
        "llm_config.model_type: is missing",
    ),
    "no llm_config": ({"llm_config": None}, "llm_config: is missing"),
    "another layer": ({"select_layer": -2}, "select_layer: is -2, only -1"),
    "another shuffle": ({"ps_version": "v1"}, "ps_version: is 'v1', only 'v2'"),
    "another format": ({"template": "Hermes-2"}, "template: is 'Hermes-2', only 'internvl2_5'"),
    "no tiles": ({"dynamic_image_size": False}, "dynamic_image_size: is False, only True"),
    "no thumbnail": ({"use_thumbnail": False}, "use_thumbnail: is False, only True"),
    "no tile": ({"min_dynamic_patch": 13}, "max_dynamic_patch: must be a whole number of at least 13, not 12"),
    "a list": ({"llm_config.model_type": ["qwen2"]}, "llm_config.model_type: is .'qwen2'., and the graphs hold"),
    "padding": ({"pad2square": True}, "pad2square: is True, only False"),
    "another size": ({"force_image_size": 896}, "force_image_size: is 896, but the vision tower has positions for 56"),
    "quantized": ({"quantization_config": {}}, "quantization_config.quant_method: is missing"),
    "a text size": ({"vision_config.image_size": "448"}, "vision_config.image_size: must be a whole number"),
    "another ratio": ({"downsample_ratio": 0.25}, "downsample_ratio: is 0.25, only 0.5"),
}


@pytest.mark.parametrize(("change", "why"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_supported_is_refused_by_its_own_name(
    change: dict[str, Any], why: str, tmp_path: Path, small_original: Path
) -> None:
    folder = Path(shutil.copytree(small_original, tmp_path / "original"))
    config = json.loads((folder / "config.json").read_text())
    for key, value in change.items():
        *sections, last = key.split(".")
        (config[sections[0]] if sections else config)[last] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CapaError, match=why) as refused:
        opened(folder)
    assert str(refused.value).startswith(f"{folder / 'config.json'}: ")


@pytest.fixture(scope="module")
def small_original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_original(tmp_path_factory.mktemp("original"), random_model())


def test_a_key_that_is_absent_is_as_in_the_authors_class() -> None:
    config = original_config(random_model().config)
    del config["ps_version"]
    with pytest.raises(CapaError, match="ps_version: is 'v1'"):
        internvl3.model_dims(config)


def test_missing_files_are_named_where_they_were_published(tmp_path: Path, small_original: Path) -> None:
    folder = Path(shutil.copytree(small_original, tmp_path / "original"))
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(CapaError, match=f"{folder / 'preprocessor_config.json'}: not found"):
        opened(folder)
    shutil.copy(small_original / "preprocessor_config.json", folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CapaError, match=f"{folder}: the tokenizer does not load: "):
        opened(folder)


def test_a_tokenizer_without_picture_tokens_is_refused(tmp_path: Path, small_original: Path) -> None:
    folder = Path(shutil.copytree(small_original, tmp_path / "original"))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        path = folder / file
        path.write_text(path.read_text().replace("<IMG_CONTEXT>", "<IMG_OTHER>"))
    with pytest.raises(CapaError, match="tokenizer has no token <IMG_CONTEXT>, which InternVL's prompts need"):
        opened(folder)
