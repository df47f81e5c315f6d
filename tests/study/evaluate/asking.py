"""What the tests of evaluation ask, and what came of it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from capa_export.bundle.store import Bundle
from capa_export.config.recipe import Recipe
from capa_export.study.evaluate.results import ANSWERS
from capa_export.study.evaluate.subject import Subject, eager_subject, methods_from
from tests.building import Building

METHODS = ("capa@2:0.75", "attention@1:0.9/full")


def building_of(recipe: Recipe, checkpoint: Path, out: Path, **options: Any) -> Building:
    images = options.pop("images", None)
    return Building.of(recipe, Bundle(out / "calibration"), checkpoint, images=images, **options)


def subject_of(building: Building, methods: Sequence[str] = METHODS, max_new_tokens: int = 4) -> Subject:
    return eager_subject(building.model, building.bundle, building.options, methods_from(methods), max_new_tokens)


def rows_of(out: Path) -> list[dict[str, Any]]:
    """What was said, in one order, without the header."""
    rows = [json.loads(line) for line in (out / ANSWERS).read_text().splitlines()[1:]]
    return sorted(rows, key=lambda row: row["key"])
