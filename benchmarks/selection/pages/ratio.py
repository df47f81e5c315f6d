"""The page of accuracy against ratio."""

from collections.abc import Iterator, Mapping

from benchmarks.selection.figures import AccuracyFigures, Row
from benchmarks.selection.pages.svg import Curve, Panel, look_of, plot
from benchmarks.selection.pages.words import (
    better,
    grid,
    joined,
    points,
    rate,
    stage_of,
    table,
    unsurpassed,
    verdict,
    worse,
)
from capa_export.config.schedule import parse_method
from capa_export.selectors.selector import load_selector

__all__ = ["FIGURES", "TITLE", "findings", "of_dense", "overview", "page", "plots"]

TITLE = "Accuracy against ratio"
FIGURES = AccuracyFigures
_KINDS_AT = (0.75, 0.9)

_Rows = Mapping[tuple[str, float], Row]


def _rows(figures: AccuracyFigures, ffn: str) -> _Rows:
    """Rows by selector and ratio."""
    return {
        (stage_of(row.scored.method).selector, stage_of(row.scored.method).ratio): row
        for row in figures.rows[1:]
        if parse_method(row.scored.method).ffn == ffn
    }


def of_dense(figures: AccuracyFigures) -> Iterator[str]:
    """Sentences on dense's own answers; kinds that it does not master tell little of pruning."""
    dense = figures.dense
    yield f"Dense answers {rate(dense.score)} % of the questions."
    weak = [f"{kind} ({100 * found.value:.0f} %)" for kind, found in dense.kinds.items() if found.value < 0.5]
    if weak:
        yield f"Dense itself answers under half of {joined(weak)}: there, no difference says much of pruning."


def findings(figures: AccuracyFigures) -> Iterator[str]:
    """Sentences on what is sure: differences whose whole interval is on one side of 0."""
    yield from of_dense(figures)
    rows = _rows(figures, "full")
    even: list[str] = []
    for ratio in _ratios(rows):
        others = {
            name: row.against["capa"] for (name, at), row in rows.items() if at == ratio and "capa" in row.against
        }
        yield from verdict(f"At ratio {ratio:g}", [(name, found.all) for name, found in others.items()])
        if not any(better(found.all) for found in others.values()):
            even.append(f"{ratio:g}")
        for kind in figures.dense.kinds if ratio in _KINDS_AT else ():
            of_kind = [(name, found.kinds[kind]) for name, found in others.items()]
            if above := [f"{name} by {points(found)}" for name, found in of_kind if better(found)]:
                yield f"At ratio {ratio:g} capa loses on {kind} to {joined(above)}."
    yield from unsurpassed(even, "ratio", "capa")
    for (name, ratio), row in _rows(figures, "scale").items():
        found = row.against["full"].all
        if better(found) or worse(found):
            verb = "gains" if better(found) else "loses"
            yield f"With FFN scales at ratio {ratio:g} {name} {verb} {points(found)}."


def _ratios(rows: _Rows) -> list[float]:
    return sorted({ratio for _, ratio in rows})


def page(figures: AccuracyFigures) -> str:
    """Tables."""
    rows, scaled = _rows(figures, "full"), _rows(figures, "scale")
    names, ratios = list(dict.fromkeys(name for name, _ in rows)), _ratios(rows)
    others = [name for name in names if "capa" in rows[name, ratios[0]].against]
    parts = [
        "Share of right answers in %, with its 95 % interval, FFNs full:",
        grid(names, ratios, lambda name, ratio: rate(rows[name, ratio].scored.score)),
        "Points above capa at the same ratio (paired):",
        grid(others, ratios, lambda name, ratio: points(rows[name, ratio].against["capa"].all, bare=True)),
        "Points above dense:",
        grid(names, ratios, lambda name, ratio: points(rows[name, ratio].scored.to_dense, bare=True)),
        "Prefill FLOPs in % of dense, one picture: an equal ratio is no equal cost.",
        grid(names, ratios, lambda name, ratio: f"{100 * rows[name, ratio].flops:.1f}"),
    ]
    kinds = list(figures.dense.kinds)
    for ratio in _KINDS_AT:
        scores = {"dense": figures.dense, **{name: rows[name, ratio].scored for name in names}}
        parts.append(f"By kind of question at ratio {ratio:g}:")
        parts.append(grid(scores, kinds, lambda name, kind, scores=scores: rate(scores[name].kinds[kind])))
    for ratio in _ratios(scaled):
        header = ["selector", "right answers", "above full FFNs", "above capa", "FLOPs, % of dense"]
        lines = ([name, *_scaled(scaled[name, ratio])] for name in names)
        parts += [f"With scales for linear visual FFNs at ratio {ratio:g}:", table(header, lines)]
    return "\n\n".join(parts)


def _scaled(row: Row) -> list[str]:
    above_capa = row.against["capa"].all if "capa" in row.against else None
    return [
        rate(row.scored.score),
        points(row.against["full"].all, bare=True),
        points(above_capa, bare=True),
        f"{100 * row.flops:.1f}",
    ]


def overview(beds: Mapping[str, AccuracyFigures]) -> str:
    """All beds in one table."""
    columns = [(bed, ratio) for bed in beds for ratio in _KINDS_AT]
    rows = {bed: _rows(figures, "full") for bed, figures in beds.items()}
    names = dict.fromkeys(name for of_bed in rows.values() for name, _ in of_bed)

    def cell(name: str, bed: str, ratio: float) -> str:
        row = rows[bed].get((name, ratio))
        return "" if row is None else rate(row.scored.score)

    body = [[name, *(cell(name, *column) for column in columns)] for name in names]
    dense = ["dense", *(rate(beds[bed].dense.score) for bed, _ in columns)]
    said = "Right answers in %, each selector at its own place, by the share of visual tokens removed; FFNs are full:"
    return f"{said}\n\n{table(['selector', *(f'{bed}, {ratio:g}' for bed, ratio in columns)], [dense, *body])}"


def plots(figures: AccuracyFigures) -> str:
    """Inside the decoder, and before it beside capa."""
    rows = _rows(figures, "full")
    names, ratios = list(dict.fromkeys(name for name, _ in rows)), _ratios(rows)
    before = [name for name in names if load_selector(name).place == "input"]
    groups = {
        "Selectors inside the decoder": [name for name in names if name not in before],
        "Selectors before the decoder, and capa": ["capa", *before],
    }
    assert figures.dense.score is not None
    return plot(
        [
            Panel(
                title=title,
                x="share of visual tokens removed",
                y="right answers",
                ticks={index: f"{ratio:g}" for index, ratio in enumerate(ratios)},
                rule=("dense", figures.dense.score.value),
                lines=[Curve(name, _curve(rows, name), look_of(name)) for name in chosen],
            )
            for title, chosen in groups.items()
        ]
    )


def _curve(rows: _Rows, selector: str) -> list[tuple[float, float]]:
    """Evenly spaced ratios: the last ones would lie on each other."""
    found = sorted(
        ((ratio, row.scored.score) for (name, ratio), row in rows.items() if name == selector), key=lambda pair: pair[0]
    )
    return [(index, score.value) for index, (_, score) in enumerate(found) if score is not None]
