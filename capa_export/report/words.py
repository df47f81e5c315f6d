"""Writes the figures of parity in the words that the report, the comment and the terminal share."""

from collections.abc import Iterable
from dataclasses import dataclass

from capa_export.base.statistics import Difference, Rate
from capa_export.report.schema import Check, ExportError, Kept, ParityReport, QuantizationError, Selection

__all__ = [
    "CheckText",
    "by_stage",
    "check_of",
    "decimals",
    "describe_check",
    "difference",
    "error",
    "open_warnings",
    "percent",
    "quantization_words",
    "rate",
    "smallest_overlap",
    "verdict",
    "worst_error",
]


@dataclass(frozen=True)
class CheckText:
    """The words for one check."""

    name: str
    value: str
    bound: str
    """Empty where no bound is set."""
    noise: str
    """The eager model's own figure in this precision; empty where it was not measured."""
    healthy: str
    """The worst figure of healthy exports; empty where nobody measured it."""
    failed: bool


def describe_check(check: Check) -> CheckText:
    """Put a check in words. Cosines are shown as their distance from 1, which keeps the digits that matter."""
    from_one = check.name.endswith("cosine")

    def figure(value: float | None) -> str:
        if value is not None and from_one:
            value = 1 - value
        if check.of is not None and value is not None:
            return f"{value:g} of {check.of}"
        match check.name:
            case "kept-set IoU" | "kept-set IoU of a prompt":
                return decimals(value)
            case "furthest flip":
                return percent(value, digits=2)
            case _:
                return error(value)

    return CheckText(
        name=f"1 - {check.name}" if from_one else check.name,
        value=figure(check.value),
        bound=_bound(check, from_one=from_one),
        noise="" if check.noise is None else figure(check.noise),
        healthy="" if check.healthy is None else figure(check.healthy),
        failed=bool(check.failure),
    )


def check_of(checks: Iterable[Check], name: str) -> Check | None:
    """The check of this name; None where there is none."""
    return next((check for check in checks if check.name == name), None)


def by_stage(selection: Selection) -> list[tuple[Kept, list[Check]]]:
    """Each stage of the schedule with its own checks, of which the kept-set IoU is the first."""
    checks: list[list[Check]] = []
    for check in selection.checks:
        if check.name == "kept-set IoU":
            checks.append([])
        checks[-1].append(check)
    return list(zip(selection.stages, checks, strict=True))


def open_warnings(parity: ParityReport) -> list[str]:
    """Warnings that no failure repeats, as those of a strict run do."""
    return [warning for warning in parity.warnings if not any(warning in failure for failure in parity.failures)]


def verdict(parity: ParityReport) -> str:
    """In a word or two: what failed comes before what the method costs."""
    if not parity.passed:
        return "FAILED"
    if not parity.fit:
        return "Not fit to ship"
    return "Passed"


def worst_error(rows: Iterable[ExportError]) -> tuple[str, str] | None:
    """The largest relative error of logits, and the artefact that shows it."""
    found = [(check, row.artefact) for row in rows if (check := check_of(row.checks, "relative error"))]
    if not found:
        return None
    check, artefact = max(found, key=lambda pair: float("inf") if pair[0].value is None else pair[0].value)
    return error(check.value), artefact


def smallest_overlap(stages: Iterable[Kept]) -> str:
    """The smallest kept-set IoU of any prompt at any stage."""
    found = [stage.iou_min for stage in stages]
    return decimals(None if None in found else min((value for value in found if value is not None), default=None))


def error(value: float | None) -> str:
    """Write a figure of any magnitude to two or three digits."""
    if value is None:
        return "not finite"
    return f"{value:.1e}" if 0 < value < 0.1 else f"{value:.3g}"


def quantization_words(found: QuantizationError) -> str:
    """What rounding the weights cost, in a line."""
    return (
        f"Quantization error on {found.prompts} prompts, eager FP32, nothing removed: KL from full precision "
        f"{decimals(found.kl)} nats, {decimals(found.kl_max)} at most; {percent(found.top1)} of next tokens as there."
    )


def decimals(value: float | None) -> str:
    """Write a figure of the magnitude of 1 to four decimals."""
    return "not finite" if value is None else f"{value:.4f}"


def percent(share: float | None, *, digits: int = 1) -> str:
    return "not finite" if share is None else f"{100 * share:.{digits}f}%"


def rate(found: Rate) -> tuple[str, str]:
    """Write a share, and its interval."""
    return percent(found.value), f"{100 * found.low:.1f} to {100 * found.high:.1f}"


def difference(found: Difference, *, scale: float = 1.0, digits: int = 4) -> tuple[str, str]:
    """Write a difference with its sign, and its interval."""
    value, low, high = (f"{scale * number:+.{digits}f}" for number in (found.value, found.low, found.high))
    return value, f"{low} to {high}"


def _bound(check: Check, *, from_one: bool) -> str:
    if check.at_most is not None:
        return f"\u2264 {check.at_most:.3g}"
    if check.at_least is None:
        return ""
    return f"\u2264 {1 - check.at_least:.3g}" if from_one else f"\u2265 {check.at_least:.4g}"
