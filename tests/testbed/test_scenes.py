"""Scenes and questions of the test beds."""

import numpy as np
import pytest

from capa_export.testbed.scenes import (
    CELL,
    COLORS,
    KINDS,
    SHAPES,
    Scene,
    Sprite,
    generator,
    questions,
    random_scene,
    render,
    samples,
)

HAND_MADE = Scene(
    sprites=(
        Sprite(0, 0, "star", "red"),
        Sprite(3, 5, "ring", "blue"),
        Sprite(7, 7, "heart", "red"),
    )
)


def test_samples_are_deterministic_and_streaming() -> None:
    first = list(samples(6, seed=3))
    again = list(samples(8, seed=3))[:6]
    assert [(s.question, s.answer, s.kind) for s in first] == [(s.question, s.answer, s.kind) for s in again]
    assert all(a.image.tobytes() == b.image.tobytes() for a, b in zip(first, again, strict=True))


def test_splits_and_seeds_differ() -> None:
    pictures = [
        next(iter(samples(1, seed=seed, split=split))).image.tobytes()
        for seed in (0, 1)
        for split in ("train", "held_out")
    ]
    assert len(set(pictures)) == 4


def test_every_kind_is_produced_and_answered_by_one_word() -> None:
    drawn = list(samples(40, seed=0))
    assert {s.kind for s in drawn} == set(KINDS)
    assert all(s.answer in {*COLORS, *SHAPES, "yes", "no"} for s in drawn)
    assert all(s.image.size == (8 * CELL, 8 * CELL) for s in drawn)


def test_yes_and_no_are_balanced() -> None:
    answers = [s.answer for s in samples(200, seed=0, kinds=["exists"])]
    assert 70 <= answers.count("yes") <= 130


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (
            "color_of",
            {
                "what color is the star ?": "red",
                "what color is the ring ?": "blue",
                "what color is the heart ?": "red",
            },
        ),
        ("shape_of", {"what shape is blue ?": "ring"}),
        (
            "exists",
            {
                "is there a red star ?": "yes",
                "is there a blue ring ?": "yes",
                "is there a red heart ?": "yes",
                "is there a red ring ?": "no",
                "is there a blue star ?": "no",
                "is there a blue heart ?": "no",
            },
        ),
        (
            "same",
            {
                "what shape has the same color as the star ?": "heart",
                "what shape has the same color as the heart ?": "star",
            },
        ),
    ],
)
def test_questions_of_a_hand_made_scene(kind: str, expected: dict[str, str]) -> None:
    assert dict(questions(HAND_MADE, kind)) == expected


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="known kinds: color_of"):
        questions(HAND_MADE, "count")


def test_sprites_are_painted_where_the_scene_says() -> None:
    pixels = np.asarray(render(HAND_MADE, generator(0))).astype(int)
    centre = pixels[CELL // 2, CELL // 2]
    assert centre[0] > 180
    assert centre[1] < 80
    assert pixels[4 * CELL : 5 * CELL, :CELL].min() > 220


def test_other_sizes_and_no_clutter() -> None:
    sample = next(iter(samples(1, seed=0, cells=(4, 12))))
    assert sample.image.size == (12 * CELL, 4 * CELL)
    assert random_scene(generator(0), clutter=False).clutter == frozenset()
    assert random_scene(generator(0), clutter=True).clutter
