"""Writes the figures of parity in the words that the report, the comment and the terminal share.

As a program, prints the table of measures that `docs/parity.md` holds.
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass

from capa_export.base.statistics import Difference, Rate
from capa_export.report.schema import Check, ExportError, Kept, ParityReport, QuantizationError, Selection

__all__ = [
    "MEANINGS",
    "CheckText",
    "by_stage",
    "check_of",
    "decimals",
    "describe_check",
    "difference",
    "error",
    "measures_table",
    "milliseconds",
    "nearest_bound",
    "open_warnings",
    "percent",
    "quantization_words",
    "rate",
    "smallest_overlap",
    "verdict",
    "worst_error",
]

MEANINGS = {
    "relative error": "Length of the difference to the reference, in units of the reference's length: 0 where both are "
    "equal, 0.01 where 1 % is off.",
    "cosine": "Cosine of the angle between result and reference, shown as 1 minus it: 0 where both point the same way.",
    "norm ratio": "How much longer or shorter the result is than the reference: 0 where both are of one length, 0.01 "
    "where 1 % is off.",
    "KL": "Kullback-Leibler divergence, in nats: what is lost where these probabilities of the next token stand for "
    "the reference's; 0 where both are equal.",
    "times the noise": "Largest difference of the logits, in units of the one that the number format alone makes in "
    "the eager model: at 1 the export errs as the format does.",
    "times the noise, typical": "The same difference in units of the noise, as the geometric mean over the steps.",
    "root of KL, times the noise": "Square root of the KL in units of the noise's own KL, since KL grows with the "
    "square of the difference.",
    "features cosine": "Cosine between what leaves the vision tower and the reference's, shown as 1 minus it.",
    "features norm ratio": "How much longer or shorter a vector is that leaves the vision tower, against the "
    "reference's.",
    "features, times the noise": "Error of what leaves the vision tower, in units of what the number format alone "
    "makes.",
    "hidden cosine": "Cosine between what leaves a decoder layer and the reference's, the worst layer and token, shown "
    "as 1 minus it.",
    "hidden norm ratio": "How much longer or shorter a vector is that leaves a decoder layer, the worst layer and "
    "token.",
    "hidden times the noise": "Error of what leaves a decoder layer, in units of what the number format alone makes; "
    "the worst layer.",
    "top-1 wrong": "Steps at which another next token is the likeliest, of those where the reference's lead exceeds "
    "twice the noise.",
    "same tokens": "Prompts whose whole answer has the reference's tokens.",
    "prompts": "Prompts that were compared.",
    "differ": "Prompts of which tokenizer and image processor make something else.",
    "runs": "Whether the graph runs to its end.",
    "kept-set IoU": "Intersection over union: tokens that both sides keep, as a share of those that either keeps; 1 "
    "where both keep the same.",
    "kept-set IoU of a prompt": "The same share for the prompt with the smallest.",
    "furthest flip": "Lead in score of a token wrongly dropped over one wrongly kept, in % of the former: how clear "
    "a choice was overturned.",
    "scores, times the noise": "Largest difference of a score near the cut, in units of what the number format alone "
    "makes.",
    "score error": "Largest difference of a score near the cut, in units of the reference's.",
    "kept sets that are no choice": "Prompts on which a stage kept too many tokens, too few, or one twice.",
    "mean IoU": "Kept-set IoU, the mean over the prompts.",
    "smallest IoU": "Kept-set IoU of the prompt with the smallest.",
    "prompts flipped": "Prompts on which one side keeps a token that the other drops.",
    "margin at the cut": "Lead in score of the worst token kept over the best one dropped, in % of the former.",
    "noise of the scores": "Largest change of a score near the cut that the number format alone makes, in %.",
    "found": "The worst figure over all prompts and steps.",
    "bound": "The limit that the gates set, and beyond which the build fails.",
    "eager itself": "The eager model's own figure in this number format; the bound leaves room for a multiple of it.",
    "healthy": "The worst figure that good exports have shown, on which the bound rests.",
    "noise": "What the number format alone makes in the eager model, without any export.",
    "accuracy": "Share of the questions whose answer is right.",
    "first token as dense": "Share of the questions whose answer begins as without pruning.",
    "five likeliest as dense": "Share of the five likeliest first tokens that are also among dense's five.",
    "KL from dense": "Kullback-Leibler divergence of the first token from the unpruned model's, in nats, the mean over "
    "the questions: 0 where nothing changed.",
    "same answer as dense": "Share of the questions whose whole answer is that of the unpruned model.",
    "first difference": "Place of the first token that differs, the mean over the answers that have one; the first "
    "token is 0.",
    "dense": "The model as it is, with all visual tokens.",
    "random": "As many visual tokens dropped as CAPA drops, by chance: what a method has to beat.",
    "cosine visual": "Cosine between what enters and what leaves the FFN of a visual token; near 1 the FFN hardly "
    "turns it, and a scale can stand for it.",
    "cosine text": "The same cosine for tokens of text.",
    "error of the scale": "What is lost where the scale stands for the FFN, as a share of the FFN's output.",
    "eta": "Mean cosine above which a layer's FFN counts as linear.",
    "alpha": "The scale of each channel that stands for a linear FFN.",
    "sinks": "Visual tokens with a channel far above the rest, which attention looks at whatever they show.",
    "FLOPs": "Additions and multiplications, counted from the model's dimensions; GFLOPs are thousands of millions.",
    "prefill": "Reading the picture and the question, until the first token of the answer can be chosen.",
    "decode": "Computing each further token of the answer.",
    "KV cache": "Keys and values of the prompt, which stay in memory while the answer is written.",
    "forecast": "Calculated from counted work and the data sheet of the device, not measured.",
    "plugin layers": "Layers of an engine that run CAPA's own kernels.",
    "weight copies": "Weights that an engine holds a second time; there should be none.",
    "contribution": "What a visual token adds to the last token of the prompt: its attention times its values. CAPA "
    "keeps the tokens that add most.",
    "attention": "Weight that the last token of the prompt gives to a visual token, the mean over the heads.",
    "value norm": "Length of what a visual token would add if every head attended to nothing else.",
    "phi": "Largest of the channels that mark sinks, in units of the token's root mean square.",
    "dump": "Probability dump: a sink that adds little; CAPA drops it.",
    "anchor": "Structural anchor: a sink that adds much; CAPA keeps it.",
}
"""Every measure that a page, a table or a comment names, in a sentence."""


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


def nearest_bound(checks: Iterable[tuple[str, Check]]) -> tuple[str, Check, float] | None:
    """The check that has used up most of what its bound allows: its artefact, the check, and the share used up.

    Args:
        checks: each with its artefact; those that failed, or allow nothing at all, do not count.
    """
    found = [
        (artefact, check, used)
        for artefact, check in checks
        if not check.failure and (used := _used_up(check)) is not None
    ]
    return max(found, key=lambda each: each[2], default=None)


def _used_up(check: Check) -> float | None:
    if check.value is None or check.of is not None:
        return None
    if check.at_most is not None:
        return check.value / check.at_most if check.at_most > 0 else None
    # A cosine and an IoU are at most 1.
    if check.at_least is None or check.at_least >= 1:
        return None
    return (1 - check.value) / (1 - check.at_least)


def measures_table() -> str:
    """The measures and their meanings as a table in Markdown."""
    rows = [f"| {name} | {meaning} |" for name, meaning in MEANINGS.items()]
    return "\n".join(["| measure | says |", "|---|---|", *rows]) + "\n"


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


def milliseconds(value: float) -> str:
    """Write a time to three digits, with its unit."""
    if value < 0.01:
        return "<0.01\u00a0ms"
    return f"{value:,.0f}\u00a0ms" if value >= 100 else f"{value:.3g}\u00a0ms"


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


if __name__ == "__main__":
    sys.stdout.write(measures_table())
