"""A comparison of two bundles as tables for people, on stdout."""

from collections.abc import Iterator
from typing import Any

from capa_export.report.terminal import make_table, print_line, print_table
from capa_export.report.words import difference, error, percent, rate
from capa_export.study.compare.schema import BundleComparison

__all__ = ["compare_table"]


def compare_table(found: BundleComparison) -> None:
    """Print the verdict, then what differs in the making, and what comes of it."""
    print_line(f"compare: {'passed' if found.passed else 'REGRESSION'}", "bold green" if found.passed else "bold red")
    for failure in found.failures:
        print_line(f"  {failure}", "red")
    print_line(f"{found.reference} -> {found.candidate}, on {found.num_prompts} prompts ({found.prompts})")
    for change in found.changes:
        print_line(f"  {change.name}: {_short(change.reference)} -> {_short(change.candidate)}")
    if not found.changes:
        print_line("  nothing differs in how they were made")
    table = make_table("", "reference", "candidate", "")
    for row in _rows(found):
        table.add_row(*row)
    print_table("What comes of it", table)
    print_line("ms: medians on this machine's processor, the two in turn; they say nothing about a GPU", "dim")


def _rows(found: BundleComparison) -> Iterator[tuple[str, str, str, str]]:
    for kept in found.kept:
        iou = "" if kept.iou is None else f"IoU {kept.iou:.4f}"
        yield f"visual tokens kept after layer {kept.layer}", _number(kept.reference), _number(kept.candidate), iou
    logits = found.logits
    where = "" if logits.diverges_at is None else f", first at token {logits.diverges_at}"
    yield f"KL over {logits.steps} tokens, mean", "", "", error(logits.kl_mean)
    yield "KL, worst", "", "", error(logits.kl_max)
    yield "same likeliest token", "", "", percent(logits.top1)
    yield "answers that diverge", "", "", f"{logits.diverged} of {found.num_prompts}{where}"
    if found.answers is not None:
        answers, change = found.answers, found.answers.difference
        before, after = (_with_interval(rate(side)) for side in (answers.reference, answers.candidate))
        points = "" if change is None else _with_interval(difference(change, scale=100, digits=1))
        yield f"accuracy, {answers.source}", before, after, points
    for timing in found.timings:
        yield f"{timing.what} ms", f"{timing.reference_ms:.2f}", f"{timing.candidate_ms:.2f}", f"{timing.ratio:.2f} x"
    for size in found.sizes:
        if size.reference != size.candidate:
            yield f"{size.file} MB", _megabytes(size.reference), _megabytes(size.candidate), ""
    for engine in found.engines:
        for fact, name in (("bytes", "MB"), ("layers", "layers"), ("custom_layers", "custom layers")):
            one, other = (side and getattr(side, fact) for side in (engine.reference, engine.candidate))
            written = _megabytes if fact == "bytes" else _short
            yield f"{engine.engine} {name}", written(one), written(other), ""


def _short(value: Any) -> str:
    """A digest by its first characters."""
    if value is None:
        return "none"
    text = str(value)
    return f"{text[:12]}..." if len(text) == 64 and set(text) <= set("0123456789abcdef") else text


def _number(value: float | None) -> str:
    return "all" if value is None else f"{value:g}"


def _with_interval(written: tuple[str, str]) -> str:
    return f"{written[0]} ({written[1]})"


def _megabytes(size: int | None) -> str:
    return "none" if size is None else f"{size / 1e6:.2f}"
