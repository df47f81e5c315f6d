"""The page of how long a choice holds."""

from collections.abc import Iterator

from benchmarks.selection.figures import Drift, RankAgreement, Stability
from benchmarks.selection.pages.svg import COLOURS, Curve, LineStyle, Panel, look_of, numbered, plot
from benchmarks.selection.pages.words import better, grid, joined, table, worse
from capa_export.base.statistics import Difference

__all__ = ["FIGURES", "TITLE", "findings", "page", "plots"]

TITLE = "How long the choice at prefill holds"
FIGURES = Stability


def _distance(found: Difference) -> str:
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"


def _of(figures: Stability, score: str, step: int) -> list[RankAgreement]:
    found = [one for one in figures.agreement if (one.score, one.step) == (score, step)]
    return sorted(found, key=lambda one: one.layer)


def findings(figures: Stability) -> Iterator[str]:
    """Sentences on the layer where capa prunes, then on who drifts least."""
    for step in range(1, len(figures.prompts)):
        own, plain = (_of(figures, score, step)[figures.layer] for score in ("capa", "attention"))
        yield (
            f"At layer {figures.layer}, contribution by the query of generated token {step} ranks the visual tokens "
            f"as the last prompt token does with Spearman {own.spearman:.2f} (attention: {plain.spearman:.2f}), and "
            f"{100 * own.overlap_quarter:.0f} % of the best quarter stay in it (25 % by chance)."
        )
    for ratio in sorted({one.ratio for one in figures.drift}):
        rows = [one for one in figures.drift if one.ratio == ratio]
        own = next(one for one in rows if one.selector == "capa")
        first = _distance(own.steps[0])
        yield f"At ratio {ratio:g} capa is {first} from dense in Hellinger distance at the first token."
        found = [(one.selector, one.to_capa) for one in rows if one.to_capa is not None]
        less = [f"{name} ({_signed(each)})" for name, each in found if worse(each)]
        more = [f"{name} ({_signed(each)})" for name, each in found if better(each)]
        if less:
            yield f"At ratio {ratio:g} these drift less than capa over the answer: {joined(less)}."
        elif found:
            yield f"At ratio {ratio:g} no selector surely drifts less than capa."
        if more:
            yield f"At ratio {ratio:g} these drift more than capa: {joined(more)}."


def _signed(found: Difference) -> str:
    return f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def page(figures: Stability) -> str:
    """Agreement by layer and step, then distances by selector."""
    prompts = ", ".join(f"{count} at step {step}" for step, count in enumerate(figures.prompts))
    header = ["layer", "step", "prompts"]
    header += [f"{score}: {what}" for score in ("capa", "attention") for what in ("Spearman", "best 25 %", "best 10 %")]
    rows: list[list[str]] = []
    for step in range(1, len(figures.prompts)):
        for own, plain in zip(_of(figures, "capa", step), _of(figures, "attention", step), strict=True):
            values = (value for one in (own, plain) for value in (one.spearman, one.overlap_quarter, one.overlap_tenth))
            rows.append([str(own.layer), str(step), str(own.prompts), *(f"{value:.2f}" for value in values)])
    says = (
        "Each query's score of the visual tokens against the last prompt token's, dense model: Spearman's correlation, "
        "and the share of the best 25 and 10 % that is in both (by chance 0.25 and 0.10). Step 0 is the last prompt "
        "token; an answer is one or two words and an end, so there are few steps."
    )
    parts = [
        says,
        table(header, rows),
        f"Hellinger distance of the next token's distribution from dense's, fed dense's answer; prompts: {prompts}.",
    ]
    for ratio in sorted({one.ratio for one in figures.drift}):
        drift = {one.selector: one for one in figures.drift if one.ratio == ratio}
        columns = [*(f"step {step}" for step in range(len(figures.prompts))), "above capa, whole answer"]

        def cell(name: str, column: str, drift: dict[str, Drift] = drift, columns: list[str] = columns) -> str:
            if column == columns[-1]:
                found = drift[name].to_capa
                return "" if found is None else _signed(found)
            return _distance(drift[name].steps[columns.index(column)])

        parts += [f"Ratio {ratio:g}:", grid(drift, columns, cell)]
    return "\n\n".join(parts)


def plots(figures: Stability) -> str:
    """Agreement by layer, then drift by step."""
    steps = range(len(figures.prompts))
    looks = {"capa": COLOURS["vermillion"], "attention": COLOURS["blue"]}
    lines = [
        Curve(
            f"{score}, step {step}",
            [(one.layer, one.spearman) for one in _of(figures, score, step)],
            LineStyle(colour, dashed=step > 1),
        )
        for score, colour in looks.items()
        for step in steps[1:3]
    ]
    layers = sorted({one.layer for one in figures.agreement})
    panels = [Panel("Agreement with prefill", "layer", "Spearman", lines, numbered(layers), percent=False)]
    for ratio in sorted({one.ratio for one in figures.drift}):
        drifts = [
            Curve(one.selector, [(step, found.value) for step, found in enumerate(one.steps)], look_of(one.selector))
            for one in figures.drift
            if one.ratio == ratio
        ]
        title = f"Drift from dense, {100 * ratio:.0f}% removed"
        panels.append(
            Panel(title, "generated tokens before", "Hellinger distance", drifts, numbered(steps), percent=False)
        )
    return plot(panels)
