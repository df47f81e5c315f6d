"""The page of accuracy against the layer."""

from collections.abc import Iterator, Mapping

from benchmarks.selection.figures import AccuracyFigures, Row
from benchmarks.selection.pages.ratio import of_dense
from benchmarks.selection.pages.svg import Curve, Panel, look_of, numbered, plot
from benchmarks.selection.pages.words import better, grid, joined, points, rate, stage_of, unsurpassed, verdict, worse

__all__ = ["FIGURES", "TITLE", "findings", "page", "plots"]

TITLE = "Accuracy against the layer"
FIGURES = AccuracyFigures
_STAGES = {"early": (0.0, 0.25), "transition": (0.25, 0.55), "late": (0.55, 1.0)}
"""Shares of the depth: LLaVA-1.5's are layers 3-5, 12-16, and 20 or more of 32."""

_Rows = Mapping[tuple[str, int, float], Row]


def _rows(figures: AccuracyFigures) -> _Rows:
    """Rows by selector, layer and ratio."""
    stages = [(stage_of(row.scored.method), row) for row in figures.rows[1:]]
    return {(stage.selector, stage.layer, stage.ratio): row for stage, row in stages}


def _name(layer: int, figures: AccuracyFigures) -> str:
    """A layer with the stage and the share of the depth that it is."""
    depth = layer / figures.layers
    stage = next(name for name, (low, high) in _STAGES.items() if low <= depth < high)
    return f"{layer} ({stage}, {100 * depth:.0f} %)"


def _axes(rows: _Rows) -> tuple[list[str], list[int], list[float]]:
    names, layers, ratios = (list(dict.fromkeys(column)) for column in zip(*rows, strict=True))
    return names, sorted(layers), sorted(ratios)


def findings(figures: AccuracyFigures) -> Iterator[str]:
    """Against capa at the same layer, and where no better than random."""
    yield from of_dense(figures)
    rows = _rows(figures)
    names, layers, ratios = _axes(rows)
    for ratio in ratios:
        costs = [(layer, rows["capa", layer, ratio].scored.to_dense) for layer in layers]
        said = joined([f"layer {_name(layer, figures)} {points(found, bare=True)}" for layer, found in costs])
        yield f"At ratio {ratio:g} capa is above dense, in points, by: {said}."
        even: dict[str, list[str]] = {"capa": [], "random": []}
        for layer in layers:
            of_layer = {name: rows[name, layer, ratio].against for name in names}
            where = f"At layer {_name(layer, figures)} and ratio {ratio:g}"
            above = {
                other: [(name, found[other].all) for name, found in of_layer.items() if other in found]
                for other in even
            }
            yield from verdict(where, above["capa"])
            if below := [
                f"{name} by {points(found)}" for name, found in above["random"] if name != "capa" and worse(found)
            ]:
                yield f"{where} random beats {joined(below)}."
            for other, found in above.items():
                if found and not any(better(each) for _, each in found):
                    even[other].append(str(layer))
        for other, where in even.items():
            yield from unsurpassed(where, f"ratio {ratio:g} and layer", other)


def page(figures: AccuracyFigures) -> str:
    """Tables."""
    rows = _rows(figures)
    names, layers, ratios = _axes(rows)
    columns = {_name(layer, figures): layer for layer in layers}
    parts: list[str] = []
    for ratio in ratios:

        def score(name: str, column: str, ratio: float = ratio) -> str:
            return rate(rows[name, columns[column], ratio].scored.score)

        parts += [f"Share of right answers in % at ratio {ratio:g}, by layer:", grid(names, list(columns), score)]
        for other in ("capa", "random"):
            compared = [name for name in names if other in rows[name, layers[0], ratio].against]

            def above(name: str, column: str, ratio: float = ratio, other: str = other) -> str:
                return points(rows[name, columns[column], ratio].against[other].all, bare=True)

            if compared:
                parts.append(f"Points above {other} at the same layer and ratio {ratio:g}:")
                parts.append(grid(compared, list(columns), above))
    return "\n\n".join(parts)


def plots(figures: AccuracyFigures) -> str:
    """A panel for each ratio."""
    rows = _rows(figures)
    names, layers, ratios = _axes(rows)
    assert figures.dense.score is not None
    return plot(
        [
            Panel(
                title=f"{100 * ratio:.0f}% removed",
                x=f"layer of {figures.layers}",
                y="right answers",
                ticks=numbered(layers),
                rule=("dense", figures.dense.score.value),
                lines=[Curve(name, _curve(rows, name, ratio), look_of(name)) for name in names],
            )
            for ratio in ratios
        ]
    )


def _curve(rows: _Rows, selector: str, ratio: float) -> list[tuple[float, float]]:
    found = sorted(
        (layer, row.scored.score) for (name, layer, at), row in rows.items() if (name, at) == (selector, ratio)
    )
    return [(layer, score.value) for layer, score in found if score is not None]
