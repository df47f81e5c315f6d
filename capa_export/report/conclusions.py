"""What a reader takes away from a report: the verdicts, four figures, and a sentence a section."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from capa_export.report import words
from capa_export.report.schema import Answers, ExportError, MethodError, ParityReport, QuantizationError, Selection

__all__ = ["export_sentence", "num_failed", "ranges_sentence", "selection_sentence", "summary", "verdicts"]


def verdicts(parity: ParityReport) -> list[tuple[str, str, str, str]]:
    """Whether the graphs are right, and whether the answers are kept: label, verdict, reason, and `good` or `bad`."""
    count = len(parity.failures)
    met = f"all {_num_bounds(parity)} bounds are met" if _num_bounds(parity) else "no bound was set"
    reason = (
        f"Do the graphs compute what the model does? Yes: {met}."
        if parity.passed
        else f"Do the graphs compute what the model does? No: {_counted(count, 'check')} failed, named below."
    )
    found = ("Parity", "passed" if parity.passed else "failed", reason, "good" if parity.passed else "bad")
    return [found, ("Answers", *_answers(parity.answers))]


def _answers(answers: Answers | None) -> tuple[str, str, str]:
    asked = "Does the model answer as it did with all visual tokens?"
    if answers is None:
        return "not measured", f"{asked} No question was asked, or the model itself was not run.", ""
    least = f"{100 * answers.least_agreement:.3g}% are asked for"
    counted = f"{answers.same} of {answers.questions} questions"
    if answers.passed:
        return answers.words, f"{asked} Yes, on {counted}; {least}.", "good"
    if answers.accepted:
        return answers.words, f"{asked} On {counted}; you accepted it.", "warn"
    return answers.words, f"{asked} Only on {counted}.", "bad"


def summary(
    parity: ParityReport, plan: Mapping[str, Any], latency: Mapping[str, Any] | None
) -> list[tuple[str, str, str]]:
    """The gain, the three questions and what rounding cost, each in one figure: label, figure, caption."""
    error, artefact = words.worst_error(parity.export_error) or ("not measured", "")
    stages = [stage for row in parity.selection for stage in row.stages]
    flips = sum(stage.flipped for stage in stages)
    return [
        ("Work", *_gain(plan, latency)),
        _method_figure(parity.method_error),
        ("Export error", error, f"largest relative error, {artefact}" if artefact else "no logits were compared"),
        (
            "Selection",
            words.smallest_overlap(stages) if stages else "not measured",
            f"smallest kept-set IoU: 1 is the same tokens; {_counted(flips, 'flip')}"
            if stages
            else "no kept tokens were compared",
        ),
        *_quantization_figure(parity.quantization_error),
    ]


def _quantization_figure(found: QuantizationError | None) -> list[tuple[str, str, str]]:
    if found is None:
        return []
    same = words.percent(found.top1)
    return [
        (
            "Quantization error",
            words.decimals(found.kl),
            f"nats of KL from full precision; {same} of next tokens as there",
        )
    ]


def _gain(plan: Mapping[str, Any], latency: Mapping[str, Any] | None) -> tuple[str, str]:
    prefill = plan["prefill"]
    less = prefill["dense"]["total"] / prefill["capa"]["total"]
    said = "fewer FLOPs to read the prompt, counted"
    timed = next((row for row in latency["rows"] if row["name"] == "prefill"), None) if latency else None
    if plan["forecast"]:
        device = plan["forecast"][0]
        times = [words.milliseconds(device[way]["first"]) for way in ("capa", "dense")]
        said += f"; forecast until the first token: {' for '.join(times)} on {device['device']}"
    elif timed:
        times = [words.milliseconds(timed[key]) for key in ("capa_ms", "dense_ms")]
        said += f"; timed on this CPU: {' for '.join(times)}"
    return f"{less:.2f} times", said


def _method_figure(found: MethodError) -> tuple[str, str, str]:
    methods = {method.name: method for method in found.methods}
    if "capa" not in methods:
        return "Answers", "not measured", "no questions"
    accuracy = {name: method.accuracy and words.percent(method.accuracy.value) for name, method in methods.items()}
    if accuracy["capa"]:
        others = ", ".join(f"{name} {share}" for name, share in accuracy.items() if name != "capa" and share)
        return "Right answers", accuracy["capa"], f"with {found.pruned}; {others}"
    others = f"; random {words.decimals(methods['random'].kl)}" if "random" in methods else ""
    return "Method error", words.decimals(methods["capa"].kl), f"nats of KL from dense{others}"


def export_sentence(parity: ParityReport) -> str:
    """How near the logits come to their bounds."""
    if failed := num_failed(parity.export_error):
        return f"No: {_counted(failed, 'check')} failed."
    found = words.nearest_bound((row.artefact, check) for row in parity.export_error for check in row.checks)
    compared = _counted(len(parity.export_error), "comparison")
    if found is None:
        return f"Nothing failed in {compared}."
    artefact, check, used = found
    return (
        f"Yes: no bound is passed in {compared}. Nearest comes {artefact}, at {words.percent(used, digits=0)} of the "
        f'bound on "{words.describe_check(check).name}".'
    )


def selection_sentence(parity: ParityReport) -> str:
    """On how many prompts another visual token was kept, and what that means."""
    if failed := num_failed(parity.selection):
        return f"No: {_counted(failed, 'check')} failed."
    stages = [(row, stage) for row in parity.selection for stage in row.stages]
    flips = sum(stage.flipped for _, stage in stages)
    compared = sum(row.prompts for row, _ in stages)
    if not flips:
        return f"Yes: the very same tokens, each of the {compared} times that they were compared."
    return (
        f"Yes, as far as the number format lets it: another token was kept {flips} of {compared} times, "
        "each time between scores that the format itself cannot tell apart."
    )


def ranges_sentence(ranges: Sequence[tuple[str, float, float, bool]]) -> str:
    """Whether FP16 holds the blocks' outputs.

    Args:
        ranges: of each block, its largest first: name, magnitude, share of FP16's largest number, whether in FP32.
    """
    over = [name for name, _, share, in_fp32 in ranges if share > 1 and not in_fp32]
    if over:
        return f"No: {_counted(len(over), 'block')} would overflow in FP16, {over[0]} first."
    half = [(name, share) for name, _, share, in_fp32 in ranges if not in_fp32]
    if not half:
        return "The largest outputs are all computed in FP32."
    name, share = half[0]
    return f"Yes: the largest output in FP16 takes up {words.percent(share)} of its range, in {name}."


def num_failed(rows: Iterable[ExportError | Selection]) -> int:
    """The checks that failed in these comparisons."""
    return sum(bool(check.failure) for row in rows for check in row.checks)


def _num_bounds(parity: ParityReport) -> int:
    rows = (*parity.export_error, *parity.selection)
    return sum(check.at_most is not None or check.at_least is not None for row in rows for check in row.checks)


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
