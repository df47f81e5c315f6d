"""What the tests of evaluation ask, and what came of it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from capa_export.bundle.store import Bundle
from capa_export.config.recipe import Recipe
from capa_export.study.evaluate.models import EvaluatedModel, eager_model, parse_methods
from capa_export.study.evaluate.results import ANSWERS
from tests.building import Building

METHODS = ("capa@2:0.75", "attention@1:0.9/full")


def building_of(recipe: Recipe, checkpoint: Path, out: Path, **options: Any) -> Building:
    images = options.pop("images", None)
    return Building.of(recipe, Bundle(out / "calibration"), checkpoint, images=images, **options)


def evaluated_model(building: Building, methods: Sequence[str] = METHODS, max_new_tokens: int = 4) -> EvaluatedModel:
    return eager_model(building.model, building.bundle, building.options, parse_methods(methods), max_new_tokens)


def rows_of(out: Path) -> list[dict[str, Any]]:
    """What was said, in one order, without the header."""
    rows = [json.loads(line) for line in (out / ANSWERS).read_text().splitlines()[1:]]
    return sorted(rows, key=lambda row: row["key"])
