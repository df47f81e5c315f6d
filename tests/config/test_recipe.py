"""Whose gates a bundle is held to."""

from pathlib import Path

import pytest

from capa_export.base.errors import CapaError, ExitCode
from capa_export.base.toml import shipped
from capa_export.config.recipe import Recipe, judging_recipe, load_recipe


def loosened(recipe: Recipe, name: str) -> Recipe:
    """The recipe of somebody who wants a bundle to pass."""
    gate = recipe.parity.fp16.model_copy(update={"cosine": recipe.parity.fp16.cosine.model_copy(update={"limit": -1})})
    method = recipe.method.model_copy(update={"least_agreement": 0})
    parity = recipe.parity.model_copy(update={"fp16": gate, "prompts": 1})
    return recipe.model_copy(update={"name": name, "parity": parity, "method": method})


def test_a_bundle_does_not_choose_its_gates() -> None:
    usual = load_recipe("qwen25vl")
    judge, note = judging_recipe(loosened(usual, "qwen25vl"), None)
    assert (judge.parity, judge.method, note) == (usual.parity, usual.method, None)
    judge, note = judging_recipe(loosened(usual, "another"), "qwen25vl")
    assert (judge.parity, note) == (usual.parity, None)


def test_gates_of_a_recipe_that_nobody_else_has_are_said_to_be_its_own() -> None:
    usual = load_recipe("qwen25vl")
    own = loosened(usual, "my\x1bown")
    judge, note = judging_recipe(own, None)
    assert judge == own
    assert note is not None and "of the bundle's own recipe, 'my\\x1bown'; --model holds it to those of yours" in note
    plain = usual.model_copy(update={"name": "mine", "method": Recipe.model_fields["method"].default})
    assert judging_recipe(plain, None) == (plain, None)


def test_a_name_of_another_family_is_no_name_to_hide_behind(tmp_path: Path) -> None:
    own = loosened(load_recipe("llava15"), "qwen25vl")
    judge, note = judging_recipe(own, None)
    assert judge == own and note is not None
    with pytest.raises(CapaError, match="--model qwen25vl: is for qwen25vl, and the bundle is a llava15") as raised:
        judging_recipe(own, "qwen25vl")
    assert raised.value.code == ExitCode.USAGE
    path = tmp_path / "mine.toml"
    path.write_text((shipped("graphs") / "llava15.toml").read_text())
    assert judging_recipe(own, str(path))[0].name == "mine"
