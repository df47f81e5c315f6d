"""The page of visual FFNs: full, scaled, left out; and eta."""

from collections.abc import Iterator

from benchmarks.selection.figures import FFNFigures, Row
from benchmarks.selection.pages.ratio import of_dense
from benchmarks.selection.pages.svg import COLOURS, Curve, LineStyle, Panel, numbered, plot
from benchmarks.selection.pages.words import better, points, rate, table, worse
from capa_export.config.recipe import ranges
from capa_export.config.schedule import parse_method

__all__ = ["FIGURES", "TITLE", "findings", "page", "plots"]

TITLE = "Visual FFNs: full, scaled, left out"
FIGURES = FFNFigures
_SAID = {
    "scale": "scales in the linear layers",
    "skip": "no FFNs in the linear layers",
    "per-image": "scales in the layers that are linear for the very picture",
}


def _parts(figures: FFNFigures) -> tuple[list[Row], list[Row]]:
    """Treatments at the recipe's eta, and the sweep."""
    swept = [row for row in figures.rows if parse_method(row.scored.method).eta is not None]
    return [row for row in figures.rows if row not in swept], swept


def findings(figures: FFNFigures) -> Iterator[str]:
    """Sentences on what each treatment costs in answers."""
    yield from of_dense(figures)
    treated, swept = _parts(figures)
    linear = figures.linear.get(f"{figures.eta:g}", ())
    yield f"At eta {figures.eta:g} calibration finds layers {ranges(linear)} of {figures.layers} linear."
    if not linear:
        yield "So scale, skip and full are the same model here, and say nothing of each other."
    for row in treated:
        stages, _, ffn = row.scored.method.partition("/")
        for other, found in row.against.items():
            than = "full FFNs" if other == "full" else "scales in calibration's layers"
            if better(found.all) or worse(found.all):
                verb = "gains" if better(found.all) else "loses"
                yield f"{stages} with {_SAID[ffn]} {verb} {points(found.all)} on {than}."
            elif other == "full" and row.flops < 1 and linear:
                yield f"{stages} with {_SAID[ffn]} does not surely differ from full FFNs: {points(found.all)}."
    sound = [row for row in swept if row.scored.to_dense is not None and not worse(row.scored.to_dense)]
    if sound:
        row = min(sound, key=lambda row: row.flops)
        yield (
            f"Of the etas that are not surely worse than dense, {parse_method(row.scored.method).eta:g} saves most: "
            f"{100 * (1 - row.flops):.1f} % of prefill FLOPs, {points(row.scored.to_dense)}."
        )


def page(figures: FFNFigures) -> str:
    """Tables."""
    treated, swept = _parts(figures)
    kinds = list(figures.dense.kinds)

    def cells(row: Row) -> list[str]:
        return [
            rate(row.scored.score),
            points(row.against["full"].all if "full" in row.against else None, bare=True),
            points(row.against["scale"].all if "scale" in row.against else None, bare=True),
            f"{100 * (1 - row.flops):.1f}",
            *(rate(row.scored.kinds.get(kind)) for kind in kinds),
        ]

    header = ["method", "right answers", "above full FFNs", "above scale", "FLOPs saved, %", *kinds]
    shares = figures.per_image
    return "\n\n".join(
        [
            f"Linear layers at eta {figures.eta:g}; share right in %, points, prefill FLOPs of one picture:",
            table(header, ([f"`{row.scored.method}`", *cells(row)] for row in treated)),
            "The line drawn elsewhere, dense with scales:",
            table(
                ["eta", "linear layers", "right answers", "above dense", "FLOPs saved, %"],
                (
                    [
                        f"{eta:g}",
                        ranges(figures.linear[f"{eta:g}"]),
                        rate(row.scored.score),
                        points(row.scored.to_dense, bare=True),
                        f"{100 * (1 - row.flops):.1f}",
                    ]
                    for row in swept
                    if (eta := parse_method(row.scored.method).eta) is not None
                ),
            ),
            f"Share of the prompts on which a layer is linear by itself, at eta {figures.eta:g}:",
            table(["layer", *map(str, range(len(shares)))], [["%", *(f"{100 * share:.0f}" for share in shares)]]),
        ]
    )


def plots(figures: FFNFigures) -> str:
    """Accuracy and cost of every eta."""
    _, swept = _parts(figures)
    etas = {eta: row for row in swept if (eta := parse_method(row.scored.method).eta) is not None}
    right = [(eta, row.scored.score.value) for eta, row in etas.items() if row.scored.score is not None]
    saved = [(eta, 1 - row.flops) for eta, row in etas.items()]
    look = LineStyle(COLOURS["vermillion"], width=2.6)
    assert figures.dense.score is not None
    dense = ("dense", figures.dense.score.value)
    return plot(
        [
            Panel(
                "Dense with scales",
                "eta",
                "right answers",
                [Curve("scales", right, look)],
                numbered(list(etas)[::2]),
                dense,
            ),
            Panel(
                "What they save",
                "eta",
                "prefill FLOPs saved",
                [Curve("scales", saved, look)],
                numbered(list(etas)[::2]),
            ),
        ]
    )
