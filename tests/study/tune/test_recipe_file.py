"""A recipe that is written is the recipe that is read."""

from pathlib import Path

import pytest

from capa_export.base.errors import CapaError
from capa_export.base.toml import shipped_names
from capa_export.config.gates import Gate
from capa_export.config.recipe import load_recipe
from capa_export.config.schedule import Prune
from capa_export.study.tune.recipe_file import recipe_text, write_recipe


@pytest.mark.parametrize("name", shipped_names("graphs"))
def test_shipped_recipes_come_back(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    write_recipe(tmp_path / f"{name}.toml", recipe, "a comment")
    assert load_recipe(str(tmp_path / f"{name}.toml")) == recipe


def test_schedule_and_odd_characters_come_back(tmp_path: Path) -> None:
    recipe = load_recipe("tiny-qwen25vl")
    stages = [
        {"selector": "dart", "ratio": 0.1, "options": {"visual_pivots": 2, "text_pivots": 3}},
        {"selector": "fastv", "layer": 2, "ratio": 0.5},
        {"selector": "capa", "layer": 4, "ratio": 1e-05 + 0.5},
    ]
    prompt = 'What "is" C:\\here?\n\x7f\x01 \u00e9'
    recipe = recipe.model_copy(
        update={
            "prune": Prune.model_validate({"schedule": stages}),
            "calibration": recipe.calibration.model_copy(update={"prompt": prompt}),
        }
    )
    path = tmp_path / "tiny-qwen25vl.toml"
    write_recipe(path, recipe, "two\nlines\x0bof a command")
    assert load_recipe(str(path)) == recipe
    assert path.read_text().startswith("# two\n# lines")
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_sections_are_as_in_shipped_recipes() -> None:
    recipe = load_recipe("qwen25vl")
    gated = recipe.parity.model_copy(update={"fp16": Gate.model_validate(recipe.parity.fp16.model_dump())})
    text = recipe_text(recipe.model_copy(update={"parity": gated}), "")
    assert "\n[prune]\nschedule = [{ layer = 3, ratio = 0.75 }]\nalternatives = [11, 21]\n" in text
    assert "\n[parity.fp16]\ncosine = { limit = 0.999, healthy = 0.99998 }\n" in text


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(CapaError, match="cannot be written"):
        write_recipe(tmp_path / "taken" / "x.toml", load_recipe("qwen25vl"), "")
