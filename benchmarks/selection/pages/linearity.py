"""The page of how linear FFNs are."""

from collections.abc import Iterator
from math import log10

from benchmarks.selection.figures import Linearity, Spread
from benchmarks.selection.pages.svg import COLOURS, Curve, LineStyle, Panel, numbered, plot
from benchmarks.selection.pages.words import table
from capa_export.config.recipe import ranges

__all__ = ["FIGURES", "TITLE", "findings", "page", "plots"]

TITLE = "How linear the FFNs are, token by token"
FIGURES = Linearity


def findings(figures: Linearity) -> Iterator[str]:
    """Visual against text tokens, and what the mean hides."""
    layers = list(enumerate(figures.layers))
    linear = [index for index, layer in layers if layer.linear]
    higher = [index for index, layer in layers if layer.visual.mean > layer.text.mean]
    yield (
        f"Mean cosine is higher for visual than for text tokens in layers {ranges(higher)} of {len(layers)}; "
        f"calibration finds layers {ranges(linear)} linear (above {figures.eta:g})."
    )
    yield from (
        f"Layer {index} counts as linear, yet {100 * layer.visual.below:.0f} % of its visual tokens lie at "
        f"{figures.eta:g} or below, a twentieth of them at {layer.visual.p05:.3f} or below."
        for index, layer in layers
        if layer.linear and layer.visual.below > 0.05
    )
    if linear:
        errors = [figures.layers[index].alpha_error for index in linear]
        yield (
            f"On pictures that calibration has not seen, alpha misses {100 * min(errors):.0f} to "
            f"{100 * max(errors):.0f} % of the norm of what leaves a linear layer."
        )
    else:
        yield "No layer is linear on the mean, so no scale is used at this eta."


def page(figures: Linearity) -> str:
    """The page: a table for visual tokens, and one for text."""

    def cells(found: Spread) -> list[str]:
        marks = (found.mean, found.p05, found.p25, found.p50, found.p75, found.p95)
        return [*(f"{value:.4f}" for value in marks), f"{100 * found.below:.1f}"]

    columns = ["mean", "5th", "25th", "50th", "75th", "95th", f"at {figures.eta:g} or below, %"]
    visual = (
        [
            str(index),
            *cells(layer.visual),
            f"{layer.alpha_error:.3f}",
            f"{layer.calibration_error:.3f}",
            "yes" if layer.linear else "",
        ]
        for index, layer in enumerate(figures.layers)
    )
    text = ([str(index), *cells(layer.text)] for index, layer in enumerate(figures.layers))
    says = (
        f"cosine(x, x + FFN(norm(x))) of {figures.visual_tokens} visual tokens, its percentiles over tokens, and "
        "|| y - alpha x || / || y || on these pictures and on calibration's:"
    )
    return "\n\n".join(
        [
            says,
            table(["layer", *columns, "alpha error", "at calibration", "linear"], visual),
            f"Of {figures.text_tokens} text tokens:",
            table(["layer", *columns], text),
        ]
    )


def _far(cosine: float) -> float:
    """Distance from linear; cosines themselves lie on each other."""
    return log10(max(1 - cosine, 1e-6))


def plots(figures: Linearity) -> str:
    """Visual percentiles with the text's median; then alpha's error."""
    count = range(len(figures.layers))

    def curve(of: str, name: str) -> list[tuple[float, float]]:
        return [(index, _far(getattr(getattr(figures.layers[index], of), name))) for index in count]

    def look(colour: str, *, dashed: bool = False, width: float = 1.6) -> LineStyle:
        return LineStyle(COLOURS[colour], dashed, width)

    lines = [
        Curve("visual, mean", curve("visual", "mean"), look("vermillion", width=2.6)),
        Curve("visual, 5th", curve("visual", "p05"), look("ochre", dashed=True)),
        Curve("visual, 25th", curve("visual", "p25"), look("ochre")),
        Curve("visual, 75th", curve("visual", "p75"), look("ochre")),
        Curve("text, mean", curve("text", "mean"), look("blue", width=2.6)),
        Curve("text, 5th", curve("text", "p05"), look("sky", dashed=True)),
    ]
    errors = [(index, layer.alpha_error) for index, layer in enumerate(figures.layers)]
    eta = (f"eta {figures.eta:g}", _far(figures.eta))
    return plot(
        [
            Panel("How far from linear", "layer", "log10 of 1 - cosine", lines, numbered(count), eta, percent=False),
            Panel(
                "What alpha misses",
                "layer",
                "of the norm",
                [Curve("held out", errors, look("vermillion"))],
                numbered(count),
            ),
        ]
    )
