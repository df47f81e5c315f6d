"""Scenes at random, questions about them with short answers, and streams of both."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from PIL import Image

from capa_export.data.drawing import COLORS, SHAPES, Number, Scene, Sprite, render

__all__ = [
    "HARD_KINDS",
    "KINDS",
    "SceneSample",
    "Split",
    "ask",
    "crowded_scene",
    "draw",
    "generator",
    "hard_scene",
    "questions",
    "random_scene",
    "samples",
]

Split = Literal["train", "held_out"]

KINDS = ("color_of", "shape_of", "exists", "same")
HARD_KINDS = ("number", "count", "relation", "pictures")
"""Small text to read, shapes to count, which of two alike is further up, and two pictures in one prompt."""

_ORDINALS = ("first", "second")
_SIDES = {"up": -1, "down": 1}
"""Word -> step in rows."""
_TWINS = 3
"""Most shapes that are there twice, where twins are asked about."""


@dataclass(frozen=True, slots=True)
class SceneSample:
    """Pictures with one question about them."""

    images: tuple[Image.Image, ...]
    question: str
    answer: str
    kind: str

    @property
    def image(self) -> Image.Image:
        """The first picture."""
        return self.images[0]


def generator(seed: int, *stream: int, split: Split = "held_out") -> np.random.Generator:
    """A generator of random numbers; the two splits never share a stream, whatever the seed.

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
    """Draw a scene: distinct shapes, one or two pairs of equal colour from four sprites on."""
    count = int(rng.integers(num_sprites[0], num_sprites[1] + 1))
    num_pairs = 0 if count < 4 else int(rng.integers(1, 3)) if count > 5 else 1
    shapes = _some(rng, SHAPES, count)
    colors = _some(rng, tuple(COLORS), count - num_pairs)
    colors += colors[:num_pairs]
    rows, cols = cells
    places = [divmod(int(i), cols) for i in rng.permutation(rows * cols)]
    sprites = tuple(
        Sprite(row, col, shape, color) for (row, col), shape, color in zip(places, shapes, colors, strict=False)
    )
    filled = frozenset(place for place in places[count:] if clutter and rng.random() < 0.7)
    return Scene(sprites=sprites, cells=cells, clutter=filled)


def hard_scene(rng: np.random.Generator, *, cells: tuple[int, int] = (8, 8), clutter: bool = True) -> Scene:
    """Draw a scene with small numbers and up to four shapes of one colour."""
    rows, cols = cells
    count = int(rng.integers(5, len(SHAPES) + 1))
    places = [divmod(int(i), cols) for i in rng.permutation(rows * cols)]
    colors: list[str] = []
    for color in _some(rng, tuple(COLORS), len(COLORS)):
        colors += [color] * int(rng.integers(1, 5))
    sprites = tuple(
        Sprite(row, col, shape, color)
        for (row, col), shape, color in zip(places, _some(rng, SHAPES, count), colors, strict=False)
    )
    free = places[count:]
    painted = _some(rng, tuple(COLORS), int(rng.integers(3, 6)))
    numbers = tuple(
        Number(*place, digits=(int(rng.integers(10)), int(rng.integers(10))), color=color)
        for place, color in zip(free, painted, strict=False)
    )
    filled = frozenset(place for place in free[len(numbers) :] if clutter and rng.random() < 0.7)
    return Scene(sprites=sprites, cells=cells, clutter=filled, numbers=numbers)


def crowded_scene(rng: np.random.Generator, *, cells: tuple[int, int] = (8, 8), heavy: bool = False) -> Scene:
    """Draw a scene with more in it than a question could be about, for a tower to learn from."""
    filled = rng.random(cells)
    sprites, numbers, clutter = (
        [(int(row), int(col)) for row, col in np.argwhere((low <= filled) & (filled < high))]
        for low, high in ((0.0, 0.3), (0.3, 0.7), (0.75, 1.0))
    )

    def one(words: Sequence[str]) -> str:
        return words[int(rng.integers(len(words)))]

    colors = tuple(COLORS)
    return Scene(
        sprites=tuple(Sprite(row, col, one(SHAPES), one(colors)) for row, col in sprites),
        cells=cells,
        clutter=frozenset(clutter),
        numbers=tuple(
            Number(row, col, (int(rng.integers(10)), int(rng.integers(10))), one(colors)) for row, col in numbers
        ),
        heavy=heavy,
    )


def _some(rng: np.random.Generator, words: Sequence[str], count: int) -> list[str]:
    """Pick `count` of the words at random, none twice."""
    return [words[int(i)] for i in rng.permutation(len(words))[:count]]


def draw(
    kind: str,
    rng: np.random.Generator,
    *,
    cells: tuple[int, int] = (8, 8),
    num_sprites: tuple[int, int] = (4, 7),
    clutter: bool = True,
    heavy: bool = False,
) -> tuple[Scene, ...]:
    """Draw the scenes of one prompt; each kind has a question about it.

    Args:
        kind: one of `KINDS` or `HARD_KINDS`.
        rng: the random stream to draw from.
        cells: rows and columns of each picture.
        num_sprites: how many, from and to; hard scenes have their own numbers.
        clutter: whether most of the other cells have a glyph.
        heavy: whether all of them have one, as large as a sprite and often of its colour.
    """
    while True:
        if kind in ("number", "count"):
            scenes = (hard_scene(rng, cells=cells, clutter=clutter),)
        else:
            count = 2 if kind == "pictures" else 1
            scenes = tuple(
                random_scene(rng, cells=cells, num_sprites=num_sprites, clutter=clutter) for _ in range(count)
            )
        if kind == "relation":
            scenes = tuple(map(_with_twins, scenes))
        if heavy:
            scenes = tuple(replace(scene, heavy=True, clutter=_free(scene)) for scene in scenes)
        if kind not in HARD_KINDS or questions(scenes, kind):
            return scenes


def _with_twins(scene: Scene) -> Scene:
    """A scene with some of its shapes there twice, in two colours."""
    drawn: list[Sprite] = []
    for sprite in scene.sprites:
        shapes = [other.shape for other in drawn]
        twins = len(shapes) - len(set(shapes))
        last = drawn[-1] if drawn else sprite
        alike = twins < _TWINS and shapes.count(last.shape) == 1 and last.color != sprite.color
        drawn.append(replace(sprite, shape=last.shape) if alike else sprite)
    return replace(scene, sprites=tuple(drawn))


def _free(scene: Scene) -> frozenset[tuple[int, int]]:
    taken = {(drawn.row, drawn.col) for drawn in (*scene.sprites, *scene.numbers)}
    return frozenset(place for place in np.ndindex(scene.cells) if place not in taken)


def questions(scenes: Sequence[Scene], kind: str) -> list[tuple[str, str]]:
    """Every question of one kind that the scenes answer, with its answer; only `pictures` is about two of them."""
    sprites, numbers = scenes[0].sprites, scenes[0].numbers
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
        case "number":
            return [(f"what number is {n.color} ?", "{} {}".format(*n.digits)) for n in numbers]
        case "count":
            return [(f"how many shapes are {color} ?", str(sum(s.color == color for s in sprites))) for color in COLORS]
        case "relation":
            return [
                (f"what color is the further {side} {s.shape} ?", s.color)
                for s in sprites
                for t in sprites
                for side, step in _SIDES.items()
                if s.shape == t.shape and s.color != t.color and step * (s.row - t.row) > 0
            ]
        case "pictures":
            return [
                (f"in the {ordinal} picture what color is the {s.shape} ?", (s, t)[i].color)
                for s in sprites
                for t in scenes[1].sprites
                if s.shape == t.shape and s.color != t.color
                for i, ordinal in enumerate(_ORDINALS)
            ]
        case _:
            known = ", ".join((*KINDS, *HARD_KINDS))
            raise ValueError(f"unknown question kind {kind!r}; known kinds: {known}")


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def ask(
    scenes: Sequence[Scene], kind: str, rng: np.random.Generator, weights: Mapping[str, float] | None = None
) -> tuple[str, str]:
    """Ask a random question of a kind; the answers of a yes or no, or of a count, are equally likely.

    Args:
        scenes: what the pictures show.
        kind: one of `KINDS` or `HARD_KINDS`.
        rng: the random stream to draw from.
        weights: how much more often than others to ask some questions; 1 for those not named.
    """
    choices = questions(scenes, kind)
    if kind in ("exists", "count"):
        answers = sorted({answer for _, answer in choices}, reverse=True)
        wanted = answers[int(rng.integers(len(answers)))]
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
    heavy: bool = False,
) -> Iterator[SceneSample]:
    """Yield samples, each with pictures of its own, the kinds in turn.

    Sample i depends on `seed`, `split`, i and the drawing options only, so a longer run
    starts with the samples of a shorter one.
    """
    for index in range(count):
        rng = generator(seed, index, split=split)
        kind = kinds[index % len(kinds)]
        scenes = draw(kind, rng, cells=cells, num_sprites=num_sprites, clutter=clutter, heavy=heavy)
        question, answer = ask(scenes, kind, rng)
        images = tuple(render(scene, rng) for scene in scenes)
        yield SceneSample(images=images, question=question, answer=answer, kind=kind)
