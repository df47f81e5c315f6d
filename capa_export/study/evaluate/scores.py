"""Turns answers into figures: means, intervals, and paired differences."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from capa_export.base.statistics import Difference, Rate, difference_of_means, difference_of_shares, wilson
from capa_export.data.metrics import METRICS, Metric, says_yes, yes_no_figures
from capa_export.data.questions import Question
from capa_export.study.evaluate.answers import DENSE, Answer
from capa_export.study.evaluate.schema import MethodScores

__all__ = ["AnsweredQuestion", "score_methods"]

_YES_OR_NO = frozenset((0.0, 1.0))
"""Scores of answers that are right or wrong; shares of people lie between."""


@dataclass(frozen=True, slots=True)
class AnsweredQuestion:
    """A question, and what each method says to it."""

    question: Question
    answers: Mapping[str, Answer]


def score_methods(
    answered: Sequence[AnsweredQuestion], methods: Sequence[str], metric: Metric
) -> Iterator[MethodScores]:
    """Every method's figures, of at least one question.

    Args:
        answered: by all methods.
        methods: dense first.
        metric: the benchmark's.
    """
    known = [entry for entry in answered if entry.question.answers]
    scores = {method: [_score(entry, method, metric) for entry in known] for method in methods}
    first = next((method for method in methods if method != DENSE), None)
    for method in methods:
        own = scores[method]
        said = [entry.answers[method] for entry in answered]
        found = MethodScores(method=method, kept=fmean(answer.kept / answer.visual for answer in said))
        if method != DENSE:
            same = [entry.answers[method].text == entry.answers[DENSE].text for entry in answered]
            found = found.model_copy(update={"same_answer": wilson(same), "kl": fmean(answer.kl for answer in said)})
        if known:
            compared = {"to_dense": DENSE, "to_first": first}
            found = found.model_copy(
                update={
                    "score": _mean(own),
                    "exact": _mean([_score(entry, method, "exact") for entry in known]) if metric != "option" else None,
                    "kinds": _by_kind(known, own),
                    "figures": _figures(known, method) if metric == "pope" else {},
                    **{
                        name: _difference(own, scores[other])
                        for name, other in compared.items()
                        if other is not None and method not in (DENSE, other)
                    },
                }
            )
        yield found


def _score(entry: AnsweredQuestion, method: str, metric: Metric) -> float:
    question = entry.question
    return METRICS[metric](entry.answers[method].text, question.answers, question.options)


def _mean(scores: Sequence[float]) -> Rate:
    if _YES_OR_NO.issuperset(scores):
        return wilson([score == 1.0 for score in scores])
    found = difference_of_means(scores, [0.0] * len(scores))
    return Rate(value=found.value, low=found.low, high=found.high)


def _difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    between = difference_of_shares if _YES_OR_NO.issuperset([*first, *second]) else difference_of_means
    return between(first, second)


def _by_kind(known: Sequence[AnsweredQuestion], scores: Sequence[float]) -> dict[str, Rate]:
    kinds = sorted({entry.question.kind for entry in known} - {""})
    of_kind = {
        kind: [score for entry, score in zip(known, scores, strict=True) if entry.question.kind == kind]
        for kind in kinds
    }
    return {kind: _mean(own) for kind, own in of_kind.items()}


def _figures(known: Sequence[AnsweredQuestion], method: str) -> dict[str, float]:
    said = [says_yes(entry.answers[method].text) for entry in known]
    return yes_no_figures(said, [says_yes(entry.question.answers[0]) for entry in known])
