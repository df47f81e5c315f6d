"""Line plots as SVG: labels at the lines' ends, the same look for a selector everywhere, light and dark."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, isfinite, log10

from capa_export.selectors.selector import load_selector, selectors

__all__ = ["COLOURS", "Curve", "LineStyle", "Panel", "look_of", "numbered", "plot"]

_PANEL, _HEIGHT = 430, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 118, 34, 44
_LABEL_STEP = 13
_MOST_LINES = 12
_LEAST_SPAN = 0.01
"""Least span of an axis, so that equal values do not look different."""

COLOURS = {
    "vermillion": "#d55e00",
    "blue": "#0072b2",
    "green": "#008f68",
    "ochre": "#a97400",
    "sky": "#3a9ad9",
    "purple": "#b65a94",
    "grey": "#7f7f7f",
}
"""After Okabe and Ito, which the colour-blind tell apart; as dark and as light as both backgrounds ask."""
_INSIDE = {
    "capa": "vermillion",
    "attention": "blue",
    "capa-mmr": "purple",
    "fastv": "green",
    "feather": "ochre",
    "iwp-style": "sky",
    "random": "grey",
}
_BEFORE = ("blue", "green", "ochre", "purple", "sky", "grey")
_STYLE = """
text { font: 11px system-ui, sans-serif; fill: #1f2328 }
.title { font-weight: 600; font-size: 12px }
.grid { stroke: #8c959f; stroke-opacity: .35 }
.rule { stroke: #6e7781; stroke-dasharray: 2 3 }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } }
"""


@dataclass(frozen=True)
class LineStyle:
    """The style of a line."""

    colour: str
    dashed: bool = False
    width: float = 1.6


@dataclass(frozen=True)
class Curve:
    """One line of a panel, with its label."""

    label: str
    points: Sequence[tuple[float, float]]
    look: LineStyle


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str
    x: str
    """Title of the x axis."""
    y: str
    lines: Sequence[Curve]
    ticks: Mapping[float, str]
    """Ticks of the x axis: their places, and what is written there."""
    rule: tuple[str, float] | None = None
    """A level to compare with, and its label."""
    percent: bool = True


def look_of(selector: str) -> LineStyle:
    """The style of a selector's line: dashed before the decoder, in a colour shared with one inside it."""
    if load_selector(selector).place != "input":
        return LineStyle(COLOURS[_INSIDE.get(selector, "grey")], width=2.6 if selector == "capa" else 1.6)
    before = [name for name in selectors() if load_selector(name).place == "input"]
    return LineStyle(COLOURS[_BEFORE[before.index(selector) % len(_BEFORE)]], dashed=True)


def numbered(values: Iterable[float]) -> dict[float, str]:
    """Ticks that say where they stand."""
    return {value: f"{value:g}" for value in values}


def plot(panels: Sequence[Panel]) -> str:
    """The panels side by side."""
    width = _PANEL * len(panels)
    parts = "".join(
        f'<g transform="translate({_PANEL * index} 0)">\n{_panel(panel)}</g>\n' for index, panel in enumerate(panels)
    )
    name = escape("; ".join(panel.title for panel in panels))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {_HEIGHT}" width="{width}" height="{_HEIGHT}" '
        f'role="img" aria-label="{name}">\n<style>{_STYLE}</style>\n{parts}</svg>\n'
    )


def _panel(panel: Panel) -> str:
    assert len(panel.lines) <= _MOST_LINES
    lines = [
        Curve(line.label, [point for point in line.points if isfinite(point[1])], line.look) for line in panel.lines
    ]
    lines = [line for line in lines if line.points]
    ys = [y for line in lines for _, y in line.points] + ([panel.rule[1]] if panel.rule else [])
    levels = _levels(min(ys, default=0.0), max(ys, default=1.0))
    xs = [*panel.ticks, *(x for line in lines for x, _ in line.points)]
    low, high = min(xs), max(xs)

    def across(x: float) -> float:
        return _LEFT + (x - low) / ((high - low) or 1.0) * (_PANEL - _LEFT - _RIGHT)

    def down(y: float) -> float:
        return _HEIGHT - _BOTTOM - (y - levels[0]) / (levels[-1] - levels[0]) * (_HEIGHT - _TOP - _BOTTOM)

    def words(value: float) -> str:
        return f"{100 * value:g}%" if panel.percent else f"{value:g}"

    right = _PANEL - _RIGHT
    out = [_text(_LEFT, 16, panel.title, "title")]
    for level in levels:
        out.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{down(level):.1f}" y2="{down(level):.1f}"/>')
        out.append(_text(_LEFT - 6, down(level) + 4, words(round(level, 9)), anchor="end"))
    out += [_text(across(tick), _HEIGHT - _BOTTOM + 16, label, anchor="middle") for tick, label in panel.ticks.items()]
    out.append(_text((_LEFT + right) / 2, _HEIGHT - 10, panel.x, anchor="middle"))
    out.append(_text(_LEFT, _TOP - 6, panel.y))
    if panel.rule:
        label, level = panel.rule
        out.append(f'<line class="rule" x1="{_LEFT}" x2="{right}" y1="{down(level):.1f}" y2="{down(level):.1f}"/>')
        # Above its line, but for the one at the top, where the axis says what it shows.
        out.append(_text(_LEFT + 4, down(level) + (13 if down(level) < _TOP + 10 else -4), label))
    ends = _apart([down(line.points[-1][1]) for line in lines])
    # Thick lines last, over the others.
    for line, end in sorted(zip(lines, ends, strict=True), key=lambda pair: pair[0].look.width):
        look, dash = line.look, ' stroke-dasharray="6 3"' if line.look.dashed else ""
        stroke = f'stroke="{look.colour}" stroke-width="{look.width}" fill="none"{dash}'
        path = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in line.points)
        out.append(f'<polyline {stroke} points="{path}"/>')
        x, y = line.points[-1]
        out.append(
            f'<path stroke="{look.colour}" stroke-opacity=".6" fill="none" '
            f'd="M{across(x) + 2:.1f} {down(y):.1f} L{right + 10} {end:.1f} h6"/>'
        )
        out.append(_text(right + 19, end + 4, line.label))
    return "".join(f"{part}\n" for part in out)


def _text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{named}>{escape(words)}</text>'


def _levels(low: float, high: float) -> list[float]:
    """Four to seven round numbers around all values."""
    rough = max(high - low, _LEAST_SPAN) / 5
    power = 10.0 ** floor(log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = floor(low / step + 1e-9), ceil(high / step - 1e-9)
    return [index * step for index in range(first, max(last, first + 1) + 1)]


def _apart(heights: Sequence[float]) -> list[float]:
    """Places for labels: as near to the lines' ends as they fit without touching."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    placed = list(heights)
    lowest = float(_TOP)
    for index in order:
        placed[index] = lowest = max(placed[index], lowest)
        lowest += _LABEL_STEP
    highest = float(_HEIGHT - 8)
    for index in reversed(order):
        placed[index] = highest = min(placed[index], highest)
        highest -= _LABEL_STEP
    return placed
