"""Draws coloured shapes, small numbers and clutter, one in a cell of a picture."""

import math
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw

__all__ = ["CELL", "COLORS", "SHAPES", "Number", "Scene", "Sprite", "render"]

CELL = 28
"""Side of a cell in pixels: what one visual token covers (2 x 2 patches of 14)."""

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 40),
    "green": (40, 155, 60),
    "blue": (40, 75, 215),
    "yellow": (238, 210, 40),
    "orange": (245, 130, 25),
    "pink": (250, 135, 195),
    "cyan": (45, 205, 220),
}


def _ring_points(count: int, *radii: float, turn: float = 0.0) -> tuple[tuple[float, float], ...]:
    """Points around a circle, upwards first, at the given radii in turn."""
    angles = [2 * math.pi * i / count + turn for i in range(count)]
    return tuple(
        (radii[i % len(radii)] * math.sin(a), -radii[i % len(radii)] * math.cos(a)) for i, a in enumerate(angles)
    )


def _heart_points(count: int = 24) -> tuple[tuple[float, float], ...]:
    angles = [2 * math.pi * i / count for i in range(count)]
    return tuple(
        (
            math.sin(a) ** 3,
            -(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)) / 16,
        )
        for a in angles
    )


_ARM = 0.34
_POLYGONS: dict[str, tuple[tuple[float, float], ...]] = {
    "square": ((-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)),
    "diamond": _ring_points(4, 1.0, 0.72),
    "star": _ring_points(10, 1.08, 0.42),
    "heart": _heart_points(),
    "cross": (
        *((-_ARM, -1.0), (_ARM, -1.0), (_ARM, -_ARM), (1.0, -_ARM), (1.0, _ARM), (_ARM, _ARM)),
        *((_ARM, 1.0), (-_ARM, 1.0), (-_ARM, _ARM), (-1.0, _ARM), (-1.0, -_ARM), (-_ARM, -_ARM)),
    ),
}
SHAPES = ("circle", "ring", *_POLYGONS)

_GLYPHS: tuple[tuple[tuple[tuple[float, float], ...], ...], ...] = (
    (((-1, -1), (-1, 1), (1, 1)),),
    (((-1, -1), (1, -1)), ((0, -1), (0, 1))),
    (((-1, -1), (1, 1)), ((-1, 1), (1, -1))),
    (((-1, -1), (1, -1), (-1, 1), (1, 1)),),
    (((-1, -1), (-1, 1)), ((-1, 0), (1, 0)), ((1, -1), (1, 1))),
    (((-1, 1), (0, -1), (1, 1)), ((-0.5, 0.2), (0.5, 0.2))),
    (((-1, -0.5), (1, -0.5)), ((-1, 0.5), (1, 0.5))),
    (((1, -1), (-1, -1), (-1, 1), (1, 1)), ((-1, 0), (0.6, 0))),
    (((-1, -1), (0, 0.2), (1, -1)), ((0, 0.2), (0, 1))),
    (((-1, 1), (1, -1)),),
)
"""Strokes of the clutter: letters and signs that are none of the shapes asked about."""

_DIGITS = (
    *("111 101 101 101 111", "010 110 010 010 111", "111 001 111 100 111", "111 001 011 001 111"),
    *("101 101 111 001 001", "111 100 111 001 111", "111 100 111 101 111", "111 001 010 010 010"),
    *("111 101 111 101 111", "111 101 111 001 111"),
)
"""Rows of dots, 3 x 5 for each of the ten digits."""
_DOT = 2
"""Side of a dot in pixels: a number of two digits is 14 wide and 10 high."""


@dataclass(frozen=True, slots=True)
class Sprite:
    """One coloured shape in one cell."""

    row: int
    col: int
    shape: str
    color: str


@dataclass(frozen=True, slots=True)
class Number:
    """Two small coloured digits in one cell."""

    row: int
    col: int
    digits: tuple[int, int]
    color: str


@dataclass(frozen=True, slots=True)
class Scene:
    """The contents of a picture; every shape occurs at most once."""

    sprites: tuple[Sprite, ...]
    cells: tuple[int, int] = (8, 8)
    clutter: frozenset[tuple[int, int]] = field(default_factory=frozenset)
    """Cells with a glyph in them, grey unless `heavy`."""
    numbers: tuple[Number, ...] = ()
    """Numbers, each of another colour; a sprite may have it too."""
    heavy: bool = False
    """Whether glyphs are as large as sprites, and every other one has a sprite's colour."""


def render(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """Paint a scene; `rng` gives the jitter and the clutter glyphs."""
    rows, cols = scene.cells
    background = tuple(int(v) for v in rng.integers(232, 251, size=3))
    image = Image.new("RGB", (cols * CELL, rows * CELL), background)
    pen = ImageDraw.Draw(image)
    for row, col in sorted(scene.clutter):
        x, y, radius = _place(rng, row, col, low=9.0 if scene.heavy else 6.0, high=12.0 if scene.heavy else 10.5)
        shade = int(rng.integers(30, 185))
        ink = (shade, shade, shade)
        if scene.heavy and rng.random() < 0.5:
            ink = _ink(rng, tuple(COLORS)[int(rng.integers(len(COLORS)))])
        swap, flip_x, flip_y = (int(v) for v in rng.integers(0, 2, size=3))
        for stroke in _GLYPHS[int(rng.integers(len(_GLYPHS)))]:
            line = [(b, a) if swap else (a, b) for a, b in stroke]
            path = [(x + radius * a * (1 - 2 * flip_x), y + radius * b * (1 - 2 * flip_y)) for a, b in line]
            pen.line(path, fill=ink, width=int(rng.integers(2, 5)))
    for sprite in scene.sprites:
        x, y, radius = _place(rng, sprite.row, sprite.col, low=10.0, high=12.5)
        fill = _ink(rng, sprite.color)
        box = (x - radius, y - radius, x + radius, y + radius)
        if sprite.shape == "circle":
            pen.ellipse(box, fill=fill)
        elif sprite.shape == "ring":
            pen.ellipse(box, outline=fill, width=4)
        else:
            pen.polygon([(x + radius * a, y + radius * b) for a, b in _POLYGONS[sprite.shape]], fill=fill)
    for number in scene.numbers:
        x, y, _ = _place(rng, number.row, number.col, low=10.0, high=10.0)
        fill = _ink(rng, number.color)
        for index, digit in enumerate(number.digits):
            for line, dots in enumerate(_DIGITS[digit].split()):
                for column in (column for column, dot in enumerate(dots) if dot == "1"):
                    left = round(x) + _DOT * (4 * index + column) - 7
                    top = round(y) + _DOT * line - 5
                    pen.rectangle((left, top, left + _DOT - 1, top + _DOT - 1), fill=fill)
    return image


def _ink(rng: np.random.Generator, color: str) -> tuple[int, int, int]:
    """The RGB of a named colour, with jitter."""
    noise = rng.integers(-14, 15, size=3)
    red, green, blue = (int(np.clip(v, 0, 255)) for v in np.asarray(COLORS[color]) + noise)
    return red, green, blue


def _place(rng: np.random.Generator, row: int, col: int, *, low: float, high: float) -> tuple[float, float, float]:
    """Centre and radius in pixels of something drawn inside one cell."""
    radius = float(rng.uniform(low, high))
    room = CELL / 2 - radius - 0.5
    dx, dy = (float(v) for v in rng.uniform(-room, room, size=2))
    return col * CELL + CELL / 2 + dx, row * CELL + CELL / 2 + dy, radius
