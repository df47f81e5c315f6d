"""Figures of a few answers, reckoned by hand."""

from collections.abc import Sequence

import pytest

from capa_export.base.statistics import wilson
from capa_export.data.metrics import Metric
from capa_export.data.questions import Question
from capa_export.study.evaluate.answers import DENSE, Answer
from capa_export.study.evaluate.schema import MethodScores
from capa_export.study.evaluate.scores import AnsweredQuestion, score_methods

FEW, FEWER = "capa@2:0.5", "capa@2:0.75"


def answered(said: Sequence[str], right: Sequence[str] = ("red",), kind: str = "") -> AnsweredQuestion:
    """Dense says the first, and two methods the others."""
    kept, kl = {DENSE: 16, FEW: 8, FEWER: 4}, {DENSE: 0.0, FEW: 0.25, FEWER: 0.5}
    answers = {
        method: Answer(method=method, text=text, tokens=1, kept=kept[method], visual=16, kl=kl[method])
        for method, text in zip((DENSE, FEW, FEWER), said, strict=True)
    }
    return AnsweredQuestion(Question(id="x", turns=(), answers=right, kind=kind), answers)


def scored(entries: Sequence[AnsweredQuestion], metric: Metric = "exact") -> dict[str, MethodScores]:
    return {found.method: found for found in score_methods(entries, [DENSE, FEW, FEWER], metric)}


def test_scores_and_what_they_are_compared_with() -> None:
    found = scored(
        [
            answered(["red", "red", "blue"], kind="color"),
            answered(["red", "blue", "blue"], kind="color"),
            answered(["star", "star", "star"], ["star"], kind="shape"),
            answered(["blue", "red", "blue"]),
        ]
    )
    rates = {method: one.score.value for method, one in found.items() if one.score is not None}
    assert rates == {DENSE: 0.75, FEW: 0.75, FEWER: 0.25}
    assert found[DENSE].score == found[DENSE].exact == wilson([True, True, True, False])
    assert (found[DENSE].to_dense, found[DENSE].to_first, found[DENSE].same_answer, found[DENSE].kl) == (None,) * 4
    few, fewer = found[FEW], found[FEWER]
    assert few.to_first is None and few.to_dense is not None and few.to_dense.value == 0
    assert few.to_dense.low < 0 < few.to_dense.high
    assert fewer.to_dense is not None and fewer.to_first is not None
    assert (fewer.to_dense.value, fewer.to_first.value) == (-0.5, -0.5)
    assert few.same_answer == wilson([True, False, True, False])
    assert (few.kl, fewer.kl) == (0.25, 0.5)
    assert [one.kept for one in found.values()] == [1, 0.5, 0.25]
    assert fewer.kinds == {"color": wilson([False, False]), "shape": wilson([True])}
    assert few.figures == {}


def test_without_right_answers_methods_are_compared_with_dense_alone() -> None:
    """Where some are known, scores are over those."""
    unknown = answered(["a", "a", "b"], [])
    few = scored([unknown])[FEWER]
    assert few.score is few.exact is few.to_dense is few.to_first is None and few.kinds == {}
    assert few.same_answer == wilson([False])
    both = scored([unknown, answered(["red", "red", "red"])])[FEWER]
    assert both.score == wilson([True]) and both.same_answer == wilson([False, True])


def test_shares_of_people_have_an_interval_that_holds_them() -> None:
    """Three of ten who say so are enough, and two are not."""
    crowd = ["red"] * 2 + ["pink"] * 8
    found = scored([answered(["red", "pink", "blue"], crowd), answered(["pink", "pink", "pink"], crowd)], "vqa")
    score = found[DENSE].score
    assert score is not None and 0.5 < score.value < 1
    assert 0 <= score.low < score.value <= score.high <= 1
    assert found[FEW].score == wilson([True, True])


def test_yes_and_no() -> None:
    found = scored(
        [answered(["yes", "no", "no"], ["yes"]), answered(["no", "no", "yes"], ["no"])],
        "pope",
    )
    assert found[DENSE].figures == {"precision": 1, "recall": 1, "f1": 1, "yes_ratio": 0.5}
    assert found[FEW].figures["recall"] == 0 and found[FEW].figures["yes_ratio"] == 0
    assert found[FEWER].score == wilson([False, False])


def test_letters_have_no_exact_match() -> None:
    question = Question(id="x", turns=(), answers=["B"], options=["cat", "dog"])
    said = {
        method: Answer(method=method, text=text, tokens=1, kept=1, visual=1, kl=0)
        for method, text in ((DENSE, "B."), (FEW, "A"))
    }
    dense, few = score_methods([AnsweredQuestion(question, said)], [DENSE, FEW], "option")
    assert dense.exact is few.exact is None
    assert dense.score == wilson([True]) and few.score == wilson([False])


@pytest.mark.parametrize("metric", ["exact", "vqa", "pope"])
def test_the_same_answers_give_the_same_figures(metric: Metric) -> None:
    entries = [answered(["yes", "no", "yes"], ["yes"] * 3 + ["no"]) for _ in range(5)]
    assert scored(entries, metric) == scored(entries, metric)
