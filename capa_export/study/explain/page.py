"""Writes the page of an explanation: one HTML file that needs nothing else to be read."""

from collections.abc import Sequence
from math import ceil, floor, log10
from pathlib import Path
from typing import Any

from capa_export.base.files import write_whole
from capa_export.report.pictures import SIDE, data_uri, fitted, overlay
from capa_export.report.templates import open_template
from capa_export.study.explain.heat import ColorScale, heat, legend, mark_sinks
from capa_export.study.explain.schema import Explanation, Maps, MethodExplanation
from capa_export.study.explain.surfaces import Surface

__all__ = ["write_page"]

_MAPS = (
    ("contribution", "Contribution", "what the token adds to the last prompt token: its attention times its values"),
    ("attention", "Attention", "of the last prompt token, the mean over heads"),
    ("value_norm", "Value norm", "of what the token would add if every head attended to nothing else"),
)

_LARGE = 768
"""Longer side of a picture that stands alone, in pixels."""


def write_page(path: Path, found: Explanation, surfaces: Sequence[Surface]) -> None:
    """Render an explanation; equal inputs give equal bytes.

    Args:
        path: of the HTML file.
        found: what was measured.
        surfaces: where its visual tokens lie, none of a picture whose tokens make no grid.
    """
    own, dense = next(method for method in found.methods if method.own), found.methods[0]
    template = open_template("page.html", Path(__file__).parent)
    page = template.render(
        found=found,
        own=own,
        conclusion=_conclusion(found, own),
        large=[
            (title, method.answer, _draw_kept(method, surfaces, _LARGE if len(surfaces) == 1 else SIDE))
            for method, title in (
                (dense, f"with all {found.visual_tokens} visual tokens"),
                (own, f"with the {len(own.kept)} that {own.method} keeps, outlined"),
            )
        ],
        undrawn=len(found.pictures) - len({surface.grid.picture for surface in surfaces}),
        cards=[(method, _draw_kept(method, surfaces), _shared(method, own)) for method in found.methods],
        maps=[_map(found.maps, surfaces, *words) for words in _MAPS],
        legend=data_uri(legend()),
        scatter=_scatter(found),
        sinks=_sinks(found, surfaces),
        marked=_draw_sinks(found, surfaces),
    )
    write_whole(path, page)


def _conclusion(found: Explanation, own: MethodExplanation) -> str:
    """What the bundle's pruning does to this answer, and how many of the others do the same."""
    share = f"{len(own.kept)} of {found.visual_tokens} visual tokens"
    others = [method.same_answer for method in found.methods[1:] if not method.own]
    gives = "the same answer as" if own.same_answer else "another answer than"
    said = f"The bundle keeps {share}, which give {gives} all of them"
    if not others:
        return f"{said}."
    counted = f"{sum(others)} of {len(others)} other methods"
    return f"{said}; so do {counted}." if own.same_answer else f"{said}; {counted} keep it."


def _shared(method: MethodExplanation, own: MethodExplanation) -> str:
    """How many of the bundle's kept tokens another method keeps too, and the IoU."""
    count, most = len({*method.kept} & {*own.kept}), len(own.kept)
    amount = "all" if count == most else "none" if not count else str(count)
    return f"{amount} of {most} (IoU {method.iou:.2f})"


def _draw_kept(method: MethodExplanation, surfaces: Sequence[Surface], side: int = SIDE) -> list[tuple[str, str]]:
    """Draw each picture with the kept tokens outlined, and describe it in words."""
    drawn: list[tuple[str, str]] = []
    for surface in surfaces:
        rows, cols, cells = surface.grid.rows, surface.grid.cols, surface.cells(method.kept)
        words = f"{surface.name}: the {len(cells)} of {rows * cols} visual tokens that {method.method} keeps"
        whole = len(cells) == rows * cols
        picture = fitted(surface.image, side) if whole else overlay(surface.image, rows, cols, cells, side)
        drawn.append((words, data_uri(picture)))
    return drawn


def _map(maps: Maps, surfaces: Sequence[Surface], key: str, title: str, words: str) -> dict[str, Any]:
    """Map one amount over all pictures, on one scale."""
    values: Sequence[float | None] = getattr(maps, key)
    scale = ColorScale.of(values)
    drawn: list[tuple[str, str]] = []
    for surface in surfaces:
        rows, cols = surface.grid.rows, surface.grid.cols
        here = [values[token] for token in surface.tokens]
        row, col = divmod(max(range(len(here)), key=lambda cell: here[cell] or 0.0), cols)
        most = f"most in row {row + 1} of {rows}, column {col + 1} of {cols}"
        picture = heat(surface.image, rows, cols, [scale.share(value) for value in here])
        drawn.append((f"{title} of each visual token over {surface.name}: {most}", data_uri(picture)))
    return {"title": title, "words": words, "scale": scale, "pictures": drawn}


def _scatter(found: Explanation) -> dict[str, Any]:
    """A scatter plot of all visual tokens by attention and contribution, in per cent."""
    maps, sinks = found.maps, found.sinks
    attention, contribution = ColorScale.of(maps.attention), ColorScale.of(maps.contribution)
    kind = {
        **dict.fromkeys(maps.kept, "kept"),
        **dict.fromkeys(sinks.dumps, "dump"),
        **dict.fromkeys(sinks.anchors, "anchor"),
    }
    points = [
        {
            "token": token,
            "kind": kind.get(token, "dropped"),
            "x": f"{100 * attention.share(maps.attention[token]):.2f}%",
            "y": f"{100 * (1 - contribution.share(maps.contribution[token])):.2f}%",
        }
        for token in range(found.visual_tokens)
    ]
    return {
        "points": sorted(points, key=lambda point: ("dropped", "kept", "dump", "anchor").index(point["kind"])),
        "cut": f"{100 * (1 - contribution.share(maps.cut)):.2f}%",
        "x_ticks": [(label, f"{100 * share:.2f}%") for label, share in _ticks(attention)],
        "y_ticks": [(label, f"{100 * (1 - share):.2f}%") for label, share in _ticks(contribution)],
    }


def _ticks(scale: ColorScale) -> list[tuple[str, float]]:
    """Round numbers on a logarithmic axis, at most seven; the ends where there is no round one between them."""
    decades = range(floor(log10(scale.low)), ceil(log10(scale.high)) + 1)
    for factors, every in (((1, 2, 5), 1), ((1,), 1), ((1,), ceil(len(decades) / 6))):
        values = [factor * 10.0**exponent for exponent in decades[::every] for factor in factors]
        inside = [value for value in values if scale.low <= value <= scale.high]
        if 1 < len(inside) <= 7:
            return [(f"{value:g}", scale.share(value)) for value in inside]
    return [(f"{value:.3g}", scale.share(value)) for value in sorted({scale.low, scale.high})]


def _sinks(found: Explanation, surfaces: Sequence[Surface]) -> list[dict[str, Any]]:
    """Rows of the table: every sink with its figures, dumps first, each in the order of its phi."""
    maps = found.maps
    by_contribution = sorted(range(found.visual_tokens), key=lambda token: -(maps.contribution[token] or 0.0))
    by_attention = sorted(range(found.visual_tokens), key=lambda token: -(maps.attention[token] or 0.0))
    return [
        {
            "token": token,
            "kind": kind,
            "where": _where(token, surfaces),
            "phi": maps.phi[token],
            "attention": maps.attention[token],
            "attention_rank": by_attention.index(token) + 1,
            "contribution": maps.contribution[token],
            "contribution_rank": by_contribution.index(token) + 1,
        }
        for kind, tokens in (("dump", found.sinks.dumps), ("anchor", found.sinks.anchors))
        for token in sorted(tokens, key=lambda token: -(maps.phi[token] or 0.0))
    ]


def _where(token: int, surfaces: Sequence[Surface]) -> str:
    for surface in surfaces:
        if token in surface.tokens:
            row, col = divmod(token - surface.grid.first, surface.grid.cols)
            return f"{surface.name}, row {row + 1}, column {col + 1}"
    return f"visual token {token}"


def _draw_sinks(found: Explanation, surfaces: Sequence[Surface]) -> list[tuple[str, str]]:
    """Draw each picture that has sinks, with the sinks marked."""
    drawn: list[tuple[str, str]] = []
    for surface in surfaces:
        dumps, anchors = surface.cells(found.sinks.dumps), surface.cells(found.sinks.anchors)
        if dumps or anchors:
            words = f"{surface.name}: {len(dumps)} dumps, crossed, and {len(anchors)} anchors, ringed"
            picture = mark_sinks(surface.image, surface.grid.rows, surface.grid.cols, dumps, anchors)
            drawn.append((words, data_uri(picture)))
    return drawn
