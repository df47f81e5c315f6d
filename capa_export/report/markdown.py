"""The parity report as Markdown, for a pull-request comment."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from capa_export.report.schema import Check, ParityReport
from capa_export.report.words import (
    by_stage,
    check_of,
    decimals,
    describe_check,
    difference,
    open_warnings,
    quantization_words,
    rate,
    verdict,
)

__all__ = ["markdown", "write_markdown"]

_MOST_FAILURES, _MOST_WARNINGS, _MOST_ROWS = 5, 3, 6
"""Most sentences and rows shown, so that the comment stays short."""
_LONGEST = 400
"""Most characters of a sentence."""
_COLUMNS = ("relative error", "cosine", "hidden cosine", "KL", "top-1 wrong", "same tokens")


def markdown(parity: ParityReport, manifest: Mapping[str, Any]) -> str:
    """The verdict, what failed, and a row per comparison: at most about 40 lines.

    Args:
        parity: the parity report.
        manifest: the bundle's manifest, with its export done.
    """
    recipe, precision = manifest["recipe"]["name"], manifest["stages"]["export"]["result"]["precision"]
    lines = [f"## {verdict(parity)}: {_text(recipe)}, {_text(precision)}", ""]
    if parity.answers is not None:
        lines += [f"answers: {parity.answers.words}", ""]
    lines += _sentences("**failed:** ", parity.failures, _MOST_FAILURES)
    lines += _sentences("**warning:** ", open_warnings(parity), _MOST_WARNINGS)
    if parity.bisection is not None:
        lines += [_text(parity.bisection.sentence), ""]
    return "\n".join([*lines, *_export_error(parity), *_selection(parity), *_method_error(parity)]).rstrip() + "\n"


def write_markdown(path: Path, parity: ParityReport, manifest: Mapping[str, Any]) -> None:
    """Write the comment that `markdown` makes to a file."""
    path.write_text(markdown(parity, manifest), encoding="utf-8")


def _export_error(parity: ParityReport) -> list[str]:
    rows: list[list[str]] = []
    for row in parity.export_error:
        cells = [_cell(check_of(row.checks, name)) for name in _COLUMNS]
        rows.append([_text(f"{row.artefact} against {row.reference}"), *cells])
    headings = [f"1 - {name}" if name.endswith("cosine") else name for name in _COLUMNS]
    return _table(["export error", *headings], rows)


def _selection(parity: ParityReport) -> list[str]:
    rows = [
        [
            _text(f"{row.artefact}, layer {stage.layer}"),
            decimals(stage.iou_mean),
            decimals(stage.iou_bound),
            f"{stage.flipped} of {row.prompts}",
            _cell(check_of(checks, "furthest flip")),
        ]
        for row in parity.selection
        for stage, checks in by_stage(row)
    ]
    return _table(["selection", "mean IoU", "bound", "flipped prompts", "furthest flip"], rows)


def _method_error(parity: ParityReport) -> list[str]:
    found = parity.method_error
    rows: list[list[str]] = []
    for method in found.methods:
        shares = [" (".join(rate(share)) + ")" if share else "" for share in (method.accuracy, method.top1)]
        rows.append([found.label(method.name), *shares, "" if method.name == "dense" else decimals(method.kl)])
    lines = _table([f"method error, {found.questions} questions", "accuracy", "first token as dense", "KL"], rows)
    if found.kl_gain is not None:
        value, interval = difference(found.kl_gain)
        lines += [f"KL of random minus KL of {found.pruned}: {value} ({interval}), 95% interval.", ""]
    if parity.quantization_error is not None:
        lines += [quantization_words(parity.quantization_error), ""]
    return lines


def _sentences(mark: str, sentences: Sequence[str], most: int) -> list[str]:
    lines = [f"- {mark}{_text(sentence)}" for sentence in sentences[:most]]
    if len(sentences) > most:
        lines.append(f"- {mark}{len(sentences) - most} more")
    return [*lines, ""] if lines else []


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return []
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows[:_MOST_ROWS]]
    if len(rows) > _MOST_ROWS:
        lines.append([f"{len(rows) - _MOST_ROWS} more", *[""] * (len(headings) - 1)])
    return [*(f"| {' | '.join(cells)} |" for cells in lines), ""]


def _cell(check: Check | None) -> str:
    if check is None:
        return ""
    found = describe_check(check)
    return f"**{found.value}**" if found.failed else found.value


def _text(text: str) -> str:
    """Put a text on one line, with nothing in it that Markdown or HTML would act upon."""
    text = " ".join(text.split())
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("@", "@<!-- -->")
    return re.sub(r"([\\`*_{}\[\]#|~])", r"\\\1", text)
