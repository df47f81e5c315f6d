"""The page of attention sinks."""

from collections.abc import Iterator
from math import sqrt

from benchmarks.selection.figures import SinkDefinition, SinkFigures, SinkLayer
from benchmarks.selection.measure.statistics import FEWEST, FLAT_COEFFICIENT, FLAT_SPLIT
from benchmarks.selection.pages.svg import COLOURS, Curve, LineStyle, Panel, numbered, plot
from benchmarks.selection.pages.words import table
from capa_export.calibrate.sums import SINK_THRESHOLD
from capa_export.config.recipe import ranges

__all__ = ["FIGURES", "TITLE", "findings", "page", "plots"]

TITLE = "Attention sinks, and what they contribute"
FIGURES = SinkFigures


def _two_groups(layer: SinkLayer) -> bool:
    coefficient, between = layer.coefficient, layer.split
    return coefficient is not None and between is not None and coefficient > FLAT_COEFFICIENT and between > FLAT_SPLIT


def findings(figures: SinkFigures) -> Iterator[str]:
    """Sentences on whether there are sinks at all, and whether they are of two sorts."""
    highest = max(figures.max_phi)
    bound = sqrt(figures.hidden_size)
    if bound < SINK_THRESHOLD:
        yield (
            f"phi cannot pass {SINK_THRESHOLD:g} here: of {figures.hidden_size} channels it is at most "
            f"{bound:.1f}, and {highest:.1f} is the most that a visual token has. The paper's test does not apply."
        )
    for definition in figures.definitions:
        yield from _of(definition, figures)


def _of(definition: SinkDefinition, figures: SinkFigures) -> Iterator[str]:
    name = f"Sinks by {definition.name}"
    if not definition.count:
        yield f"{name}: none among {figures.visual_tokens} visual tokens in any layer."
        return
    told = [index for index, layer in enumerate(definition.layers) if layer.coefficient is not None]
    two = [index for index in told if _two_groups(definition.layers[index])]
    where = [index for index, layer in enumerate(definition.layers) if layer.sinks]
    if not told:
        yield f"{name}: fewer than {FEWEST} in every layer (in layers {ranges(where)}), too few to tell groups."
    elif two:
        yield (
            f"{name}: in layers {ranges(where)}; their contribution falls into two groups in {len(two)} of the "
            f"{len(told)} layers that have enough of them to tell ({ranges(two)})."
        )
    else:
        yield f"{name}: in layers {ranges(where)}; their contribution does not fall into two groups in any layer."


def page(figures: SinkFigures) -> str:
    """A table for each definition."""
    says = (
        "Two groups are told where the bimodality coefficient (skewness^2 + 1) / kurtosis of log contribution is above "
        f"{FLAT_COEFFICIENT:.3f}, and a cut puts more than {100 * FLAT_SPLIT:.0f} % of its variance between its sides: "
        f"a flat distribution has just that. Below {FEWEST} sinks nothing is told."
    )
    parts = [
        says,
        "Largest phi of a visual token, by layer:",
        table(
            ["layer", *(str(layer) for layer in range(len(figures.max_phi)))],
            [["phi", *(f"{value:.1f}" for value in figures.max_phi)]],
        ),
        f"Sink channels that calibration found: {', '.join(map(str, figures.channels)) or 'none'}.",
    ]
    for definition in figures.definitions:
        rows = (
            [
                str(index),
                str(layer.sinks),
                f"{100 * layer.sinks / figures.visual_tokens:.2f}",
                *(
                    "" if value is None else f"{value:.2f}"
                    for value in (layer.contribution, layer.coefficient, layer.split)
                ),
                "yes" if _two_groups(layer) else "no" if layer.coefficient is not None else "",
            ]
            for index, layer in enumerate(definition.layers)
        )
        header = ["layer", "sinks", "% of visual", "contribution, times others'", "coefficient", "split", "two groups"]
        parts += [f"By {definition.name}: {definition.says}.", table(header, rows) if definition.count else "None."]
    return "\n\n".join(parts)


def plots(figures: SinkFigures) -> str:
    """The definitions that find any, side by side; the others' contribution where none does."""
    found = [definition for definition in figures.definitions if definition.count] or figures.definitions[-1:]
    middles = [(low + high) / 2 for low, high in zip(figures.edges, figures.edges[1:], strict=False)]
    panels: list[Panel] = []
    for definition in found:
        sinks, others = (list(zip(middles, shares, strict=True)) for shares in definition.histogram)
        lines = [Curve("others", others, LineStyle(COLOURS["grey"]))]
        if definition.count:
            lines.append(Curve("sinks", sinks, LineStyle(COLOURS["vermillion"], width=2.6)))
        title = f"Sinks by {definition.name}"
        panels.append(
            Panel(title, "log10 of contribution over median", "share of tokens", lines, numbered(range(-3, 5)))
        )
    return plot(panels)
