"""An evaluation as tables for people, on stdout."""

from capa_export.base.statistics import Difference, Rate
from capa_export.report.terminal import make_table, print_line, print_table
from capa_export.report.words import decimals, percent
from capa_export.study.evaluate.answers import DENSE
from capa_export.study.evaluate.schema import Evaluation

__all__ = ["evaluation_table"]

_METRICS = {"exact": "exact match", "vqa": "VQA accuracy", "pope": "POPE accuracy", "option": "right option"}
_MOST_KINDS = 8
"""Kinds of question that a table has room for."""


def evaluation_table(found: Evaluation) -> None:
    """Print a row for each method, then the scores by kind of question."""
    others = ["minus first"] if len(found.methods) > 2 else []
    table = make_table("", "score", "minus dense", *others, "as dense", "KL", "kept")
    for row in found.methods:
        table.add_row(
            row.method,
            _rate(row.score),
            _difference(row.to_dense),
            *([_difference(row.to_first)] if others else []),
            _rate(row.same_answer),
            "" if row.method == DENSE else decimals(row.kl),
            percent(row.kept),
        )
    known = "" if found.answered == found.questions else f", {found.answered} with known answers"
    print_table(
        f"{found.benchmark}: {_METRICS[found.metric]} on {found.questions} questions{known}, {found.runs} "
        "(95% interval; differences in points; KL from dense, first token)",
        table,
    )
    kinds = sorted({kind for row in found.methods for kind in row.kinds})
    if 1 < len(kinds) <= _MOST_KINDS:
        table = make_table("", *kinds)
        for row in found.methods:
            table.add_row(row.method, *(_rate(row.kinds.get(kind)) for kind in kinds))
        print_table("By kind of question", table)
    if figures := list(dict.fromkeys(figure for row in found.methods for figure in row.figures)):
        table = make_table("", *figures)
        for row in found.methods:
            table.add_row(row.method, *(percent(row.figures[figure]) for figure in figures))
        print_table("Beside accuracy", table)
    for note in found.notes:
        print_line(note, "dim")


def _rate(found: Rate | None) -> str:
    return "" if found is None else f"{percent(found.value)} ({100 * found.low:.0f}-{100 * found.high:.0f})"


def _difference(found: Difference | None) -> str:
    if found is None:
        return ""
    return f"{100 * found.value:+.1f} ({100 * found.low:+.1f} to {100 * found.high:+.1f})"
