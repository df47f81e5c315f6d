"""What a report says of a check, and of which stage it is."""

from capa_export.report.schema import Check, Kept, Selection
from capa_export.report.words import by_stage, describe_check

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
