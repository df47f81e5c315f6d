"""Every family has INT4 in its graphs, which answer as the eager model of the rounded weights does."""

from pathlib import Path
from typing import Any

import pytest

from capa_export.bundle.store import Bundle
from capa_export.config.recipe import Recipe, load_recipe
from tests.building import Building
from tests.conftest import noise
from tests.models import FAMILIES


@pytest.mark.parametrize(
    ("family", "word"),
    [
        ("internvl3", "int4:32"),
        *(pytest.param(family, "int4:32/rtn", marks=pytest.mark.exhaustive) for family in ("llava15", "qwen3vl")),
    ],
)
def test_a_build_passes_its_gates(family: str, word: str, tmp_path: Path) -> None:
    folder = FAMILIES[family].save_model(tmp_path / "checkpoint", FAMILIES[family].random_model())
    data: dict[str, Any] = load_recipe(family).model_dump() | {"quantize": word}
    data["prune"] = {"schedule": [{"layer": 2, "ratio": 0.75}]}
    data["parity"] |= {"prompts": 1, "steps": 2, "accuracy_samples": 1}
    noise(112, 84).save(tmp_path / "picture.png")
    building = Building.of(
        Recipe.model_validate(data),
        *(Bundle(tmp_path / "out"), folder),
        images=tmp_path / "picture.png",
        precision="fp16",
        ffn=False,
    )
    parity = building.build()
    assert parity.passed, [check.failure for error in parity.export_error for check in error.checks]
    packing = building.bundle.stage("export")["result"]["packing"]
    assert (packing["packed"], packing["type"], packing["group"]) == (34, "int4", 32)
