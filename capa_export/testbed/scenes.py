"""Drawn scenes of coloured shapes, and questions about them with one-word answers."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

__all__ = [
    "CELL",
    "COLORS",
    "KINDS",
    "SHAPES",
    "Sample",
    "Scene",
    "Split",
    "Sprite",
    "ask",
    "generator",
    "questions",
    "random_scene",
    "render",
    "samples",
]

Split = Literal["train", "held_out"]

CELL = 28
"""Side of a cell in pixels: what one visual token covers (2 x 2 patches of 14)."""

KINDS = ("color_of", "shape_of", "exists", "same")

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


@dataclass(frozen=True, slots=True)
class Sprite:
    """One coloured shape in one cell."""

    row: int
    col: int
    shape: str
    color: str


@dataclass(frozen=True, slots=True)
class Scene:
    """What a picture shows; every shape occurs at most once."""

    sprites: tuple[Sprite, ...]
    cells: tuple[int, int] = (8, 8)
    clutter: frozenset[tuple[int, int]] = field(default_factory=frozenset)
    """Cells with a grey glyph in them."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One picture with one question about it."""

    image: Image.Image
    question: str
    answer: str
    kind: str


def generator(seed: int, *stream: int, split: Split = "held_out") -> np.random.Generator:
    """A random stream; the two splits never share one, whatever the seed.

    The split is the first number of the `SeedSequence` spawn key, so training reads streams
    (seed, 0, ...) and evaluation (seed, 1, ...).
    """
    key = (("train", "held_out").index(split), *stream)
    return np.random.default_rng(np.random.SeedSequence(entropy=seed, spawn_key=key))


def random_scene(
    rng: np.random.Generator,
    *,
    cells: tuple[int, int] = (8, 8),
    num_sprites: tuple[int, int] = (4, 7),
    clutter: bool = True,
) -> Scene:
    """Draws a scene: distinct shapes, one or two pairs of equal colour from four sprites on."""
    count = int(rng.integers(num_sprites[0], num_sprites[1] + 1))
    num_pairs = 0 if count < 4 else int(rng.integers(1, 3)) if count > 5 else 1
    shapes = [SHAPES[i] for i in rng.permutation(len(SHAPES))[:count]]
    colors = [tuple(COLORS)[i] for i in rng.permutation(len(COLORS))[: count - num_pairs]]
    colors += colors[:num_pairs]
    rows, cols = cells
    places = [divmod(int(i), cols) for i in rng.permutation(rows * cols)]
    sprites = tuple(
        Sprite(row, col, shape, color) for (row, col), shape, color in zip(places, shapes, colors, strict=False)
    )
    filled = frozenset(place for place in places[count:] if clutter and rng.random() < 0.7)
    return Scene(sprites=sprites, cells=cells, clutter=filled)


def render(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """Paints a scene; `rng` gives the jitter and the clutter glyphs."""
    rows, cols = scene.cells
    background = tuple(int(v) for v in rng.integers(232, 251, size=3))
    image = Image.new("RGB", (cols * CELL, rows * CELL), background)
    pen = ImageDraw.Draw(image)
    for row, col in sorted(scene.clutter):
        x, y, radius = _place(rng, row, col, low=6.0, high=10.5)
        shade = int(rng.integers(30, 185))
        swap, flip_x, flip_y = (int(v) for v in rng.integers(0, 2, size=3))
        for stroke in _GLYPHS[int(rng.integers(len(_GLYPHS)))]:
            line = [(b, a) if swap else (a, b) for a, b in stroke]
            path = [(x + radius * a * (1 - 2 * flip_x), y + radius * b * (1 - 2 * flip_y)) for a, b in line]
            pen.line(path, fill=(shade, shade, shade), width=int(rng.integers(2, 5)))
    for sprite in scene.sprites:
        x, y, radius = _place(rng, sprite.row, sprite.col, low=10.0, high=12.5)
        noise = rng.integers(-14, 15, size=3)
        red, green, blue = (int(np.clip(v, 0, 255)) for v in np.asarray(COLORS[sprite.color]) + noise)
        fill = (red, green, blue)
        box = (x - radius, y - radius, x + radius, y + radius)
        if sprite.shape == "circle":
            pen.ellipse(box, fill=fill)
        elif sprite.shape == "ring":
            pen.ellipse(box, outline=fill, width=4)
        else:
            pen.polygon([(x + radius * a, y + radius * b) for a, b in _POLYGONS[sprite.shape]], fill=fill)
    return image


def _place(rng: np.random.Generator, row: int, col: int, *, low: float, high: float) -> tuple[float, float, float]:
    """Centre and radius in pixels of something drawn inside one cell."""
    radius = float(rng.uniform(low, high))
    room = CELL / 2 - radius - 0.5
    dx, dy = (float(v) for v in rng.uniform(-room, room, size=2))
    return col * CELL + CELL / 2 + dx, row * CELL + CELL / 2 + dy, radius


def questions(scene: Scene, kind: str) -> list[tuple[str, str]]:
    """Every question of one kind that the scene answers, with its answer."""
    sprites = scene.sprites
    same_color = {s: [t for t in sprites if t.color == s.color and t != s] for s in sprites}
    match kind:
        case "color_of":
            return [(f"what color is the {s.shape} ?", s.color) for s in sprites]
        case "shape_of":
            return [(f"what shape is {s.color} ?", s.shape) for s in sprites if not same_color[s]]
        case "exists":
            return [
                (f"is there {_article(s.color)} {s.color} {t.shape} ?", "yes" if s.color == t.color else "no")
                for s in sprites
                for t in sprites
                if s == t or s.color != t.color
            ]
        case "same":
            return [
                (f"what shape has the same color as the {s.shape} ?", same_color[s][0].shape)
                for s in sprites
                if len(same_color[s]) == 1
            ]
        case _:
            raise ValueError(f"unknown question kind {kind!r}; known kinds: {', '.join(KINDS)}")


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def ask(
    scene: Scene, kind: str, rng: np.random.Generator, weights: Mapping[str, float] | None = None
) -> tuple[str, str]:
    """One question of a kind at random; yes and no are equally likely.

    Args:
        scene: what the picture shows.
        kind: one of `KINDS`.
        rng: the random stream to draw from.
        weights: how much more often than others to ask some questions; 1 for those not named.
    """
    choices = questions(scene, kind)
    if kind == "exists":
        wanted = ("yes", "no")[int(rng.integers(2))]
        choices = [choice for choice in choices if choice[1] == wanted]
    share = np.array([1.0 if weights is None else weights.get(q, 1.0) for q, _ in choices]).cumsum()
    return choices[int(np.searchsorted(share, rng.random() * share[-1], side="right"))]


def samples(
    count: int,
    *,
    seed: int,
    kinds: Sequence[str] = KINDS,
    split: Split = "held_out",
    cells: tuple[int, int] = (8, 8),
    num_sprites: tuple[int, int] = (4, 7),
    clutter: bool = True,
) -> Iterator[Sample]:
    """Yields samples, each with a picture of its own, the kinds in turn.

    Sample i depends on `seed`, `split`, i and the drawing options only, so a longer run
    starts with the samples of a shorter one.
    """
    for index in range(count):
        rng = generator(seed, index, split=split)
        kind = kinds[index % len(kinds)]
        scene = random_scene(rng, cells=cells, num_sprites=num_sprites, clutter=clutter)
        question, answer = ask(scene, kind, rng)
        yield Sample(image=render(scene, rng), question=question, answer=answer, kind=kind)
