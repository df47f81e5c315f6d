"""Gates: said once for all recipes, unless a recipe or a file says otherwise."""

from pathlib import Path

import pytest

from capa_export.base.errors import CapaError
from capa_export.base.toml import shipped, shipped_names
from capa_export.config.gates import Gate, with_gates
from capa_export.config.recipe import load_recipe

RECIPE = """family = "qwen25vl"
checkpoint = "x/y"
[prune]
schedule = [{ layer = 3, ratio = 0.75 }]
"""
OWN = """[parity.fp16]
cosine = 0.5
norm_ratio = 0.1
hidden_cosine = 0.5
hidden_norm_ratio = 0.1
flip_distance = 0.0
"""


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_gates_are_no_recipe() -> None:
    assert "gates" not in shipped_names("graphs")
    with pytest.raises(CapaError, match="unknown model 'gates'"):
        load_recipe("gates")


def test_a_recipe_that_says_nothing_has_the_shipped_gates(tmp_path: Path) -> None:
    parity = load_recipe(str(written(tmp_path / "mine.toml", RECIPE))).parity
    assert parity == load_recipe("qwen25vl").parity
    assert parity == with_gates(parity, shipped("graphs") / "gates.toml")
    assert (parity.fp32.cosine.limit, parity.fp16.cosine.limit, parity.bf16.cosine.limit) == (0.99999, 0.999, 0.99)
    assert parity.fp32.same_tokens


def test_a_table_of_its_own_takes_the_place_of_the_shipped_one(tmp_path: Path) -> None:
    parity = load_recipe(str(written(tmp_path / "mine.toml", RECIPE + OWN))).parity
    bounds = {"cosine": 0.5, "norm_ratio": 0.1, "hidden_cosine": 0.5, "hidden_norm_ratio": 0.1, "flip_distance": 0.0}
    assert parity.fp16 == Gate.model_validate(bounds)
    assert parity.bf16 == load_recipe("qwen25vl").parity.bf16


def test_a_file_changes_the_bounds_that_it_names(tmp_path: Path) -> None:
    shipped_gates = load_recipe("qwen25vl").parity
    changed = with_gates(shipped_gates, written(tmp_path / "gates.toml", "[fp16]\ncosine = 0.5\n"))
    assert changed.fp16.cosine.limit == 0.5
    assert changed.fp16.kl == shipped_gates.fp16.kl and changed.fp32 == shipped_gates.fp32
