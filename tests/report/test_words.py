"""What a report says of a check, of which stage it is, and what its measures mean."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import capa_export.parity
from capa_export.report.schema import Check, Kept, Selection
from capa_export.report.words import MEANINGS, by_stage, describe_check, measures_table, nearest_bound

ROOT = Path(__file__).parents[2]

STEPS = ("kept-set IoU", "kept-set IoU of a prompt")
AMOUNTS = ("kept-set IoU", "furthest flip", "scores, times the noise")


def test_a_check_is_its_own_stages_whatever_others_are_asked() -> None:
    """A selector that chooses step by step has other checks than one whose scores compare."""
    for first, second in ((STEPS, AMOUNTS), (AMOUNTS, STEPS)):
        checks = [Check(name=name, value=1 / (place + 2)) for place, name in enumerate(first + second)]
        shares = dict.fromkeys(("iou_mean", "iou_min", "iou_bound"), 1.0)
        amounts = dict.fromkeys(("margin_min", "margin_median", "score_noise"), None)
        stages = tuple(Kept(layer=layer, **shares, **amounts, flipped=0) for layer in (-1, 3))
        row = Selection(artefact="x", reference="y", prompts=2, stages=stages, checks=tuple(checks))
        assert by_stage(row) == [(stages[0], checks[: len(first)]), (stages[1], checks[len(first) :])]


def test_shares_are_written_alike() -> None:
    assert [describe_check(Check(name=name, value=0.75)).value for name in STEPS] == ["0.7500"] * 2


def _named(source: str) -> Iterator[str]:
    """Names of the checks that a module makes: literals given to a check or to what makes one."""
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        of = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        named = [word.value for word in call.keywords if word.arg == "name"] if of == "Check" else []
        place = {"bounded": 1, "_absolute": 0}.get(of)
        if place is not None:
            named = call.args[place : place + 1]
        yield from (str(name.value) for name in named if isinstance(name, ast.Constant))


def test_every_check_of_a_validation_is_explained() -> None:
    folder = Path(capa_export.parity.__file__).parent
    named = {name for path in folder.glob("*.py") for name in _named(path.read_text(encoding="utf-8"))}
    assert {"KL", "kept-set IoU", "features cosine", "top-1 wrong", "score error", "runs"} <= named
    assert named <= set(MEANINGS)


def test_the_docs_explain_the_same_measures() -> None:
    assert (ROOT / "docs" / "parity.md").read_text(encoding="utf-8").endswith(f"\n\n{measures_table()}")
    assert all(meaning.endswith(".") and "|" not in meaning for meaning in MEANINGS.values())


def test_the_nearest_bound_is_the_one_with_least_room_left() -> None:
    far, near = Check(name="KL", value=0.1, at_most=1.0), Check(name="hidden cosine", value=0.992, at_least=0.99)
    others = [
        Check(name="relative error", value=9.0),
        Check(name="top-1 wrong", value=0, at_most=0, of=4),
        Check(name="same tokens", value=4, at_least=4, of=4),
        Check(name="norm ratio", value=2.0, at_most=1.0, failure="too long"),
        Check(name="times the noise", value=None, at_most=1.0, failure="not finite"),
    ]
    assert nearest_bound([("a", far), ("b", near), *(("c", check) for check in others)]) == (
        "b",
        near,
        pytest.approx(0.8),
    )
    assert nearest_bound([("c", check) for check in others]) is None
