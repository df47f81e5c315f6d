"""The recipe that a checkpoint's config.json asks for."""

import json
from pathlib import Path
from typing import Any

import pytest

from capa_export.base.errors import CapaError, ExitCode
from capa_export.base.toml import shipped_names
from capa_export.config.recipe import load_recipe
from capa_export.model.families import load_family
from capa_export.model.recipe_choice import find_recipe
from tests.model.families.qwen3vl.test_dims import published as published_qwen3vl
from tests.model.families.test_internvl3 import SIZES, published
from tests.models import FAMILIES
from tests.models.internvl3 import original_config, small_config


def folder_of(folder: Path, config: dict[str, Any]) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_found(family: str, tmp_path: Path) -> None:
    checkpoint = FAMILIES[family].save_model(tmp_path, FAMILIES[family].random_model())
    assert find_recipe(str(checkpoint)).name == family


@pytest.mark.parametrize("size", SIZES)
def test_internvl_is_found_by_its_decoder(size: str, tmp_path: Path) -> None:
    recipe = "internvl3" if size.startswith("3-") else "internvl35"
    assert find_recipe(folder_of(tmp_path, published(size))).name == recipe


@pytest.mark.parametrize(("decoder", "recipe"), [("qwen2", "internvl3"), ("qwen3", "internvl35")])
def test_the_authors_layout_is_found(decoder: str, recipe: str, tmp_path: Path) -> None:
    config = original_config(small_config(text={"model_type": decoder}))
    assert find_recipe(folder_of(tmp_path, config)).name == recipe


def test_architectures_do_not_decide(tmp_path: Path) -> None:
    config = published_qwen3vl(architectures=["Qwen3VLModel"])
    assert find_recipe(folder_of(tmp_path, config)).name == "qwen3vl"


def test_a_decoder_that_no_recipe_is_for_is_refused_by_the_family(tmp_path: Path) -> None:
    config = published("3.5-8B")
    config["text_config"]["model_type"] = "gpt_oss"
    recipe = find_recipe(folder_of(tmp_path, config))
    with pytest.raises(CapaError, match=r"text_config\.model_type: is 'gpt_oss', and the graphs hold dense"):
        load_family(recipe.family).model_dims(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "qwen2_vl"}, "model_type is 'qwen2_vl', and no recipe is for that; supported: internvl, "),
        ({"model_type": ["llava"]}, "model_type is .'llava'., and no recipe is for that"),
        ({}, "has no model_type, and no recipe is for that; supported: internvl, internvl_chat, llava, qwen2_5_vl, qw"),
        ({"text_config": 3, "model_type": "phi"}, "model_type is 'phi'"),
    ],
)
def test_an_unknown_model_is_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CapaError, match=message) as refused:
        find_recipe(folder_of(tmp_path, config))
    assert refused.value.code == ExitCode.PREFLIGHT


@pytest.mark.parametrize("name", ["tiny-qwen25vl", "qwen25vl", "mine.toml"])
def test_a_recipe_is_no_checkpoint(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CapaError, match=f"{name}: is a recipe, not a checkpoint; say --model {name}"):
        find_recipe(name)


def test_no_two_recipes_claim_a_model() -> None:
    recipes = [load_recipe(name) for name in shipped_names("graphs")]
    for claims in ([recipe.model_types for recipe in recipes], [recipe.published for recipe in recipes]):
        entries = [entry for claim in claims for entry in claim]
        assert len(entries) == len(set(entries))
    for recipe in recipes:
        assert not recipe.published or recipe.checkpoint in recipe.published
        assert bool(recipe.published) == bool(recipe.model_types)
