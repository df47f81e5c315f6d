"""Scenes and questions of the test beds."""

from dataclasses import replace

import numpy as np
import pytest

from capa_export.data.drawing import CELL, COLORS, SHAPES, Number, Scene, Sprite, render
from capa_export.data.scenes import (
    HARD_KINDS,
    KINDS,
    Split,
    ask,
    crowded_scene,
    draw,
    generator,
    questions,
    random_scene,
    samples,
)

HAND_MADE = Scene(
    sprites=(
        Sprite(0, 0, "star", "red"),
        Sprite(3, 5, "ring", "blue"),
        Sprite(7, 7, "heart", "red"),
    )
)
LINED_UP = Scene(
    sprites=(
        Sprite(2, 1, "star", "red"),
        Sprite(2, 4, "ring", "blue"),
        Sprite(2, 6, "heart", "red"),
        Sprite(7, 4, "cross", "red"),
    ),
    numbers=(Number(0, 0, (4, 7), "blue"), Number(5, 4, (0, 9), "pink")),
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
    assert dict(questions([HAND_MADE], kind)) == expected


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("number", {"what number is blue ?": "4 7", "what number is pink ?": "0 9"}),
        (
            "count",
            {f"how many shapes are {color} ?": {"red": "3", "blue": "1"}.get(color, "0") for color in COLORS},
        ),
    ],
)
def test_hard_questions_of_a_hand_made_scene(kind: str, expected: dict[str, str]) -> None:
    assert dict(questions([LINED_UP], kind)) == expected


def test_of_two_alike_one_is_further_up_unless_they_stand_in_one_row() -> None:
    stars = (Sprite(2, 4, "star", "red"), Sprite(3, 1, "star", "blue"))
    side_by_side = (Sprite(5, 1, "ring", "red"), Sprite(5, 4, "ring", "blue"))
    assert dict(questions([Scene(sprites=(*stars, *side_by_side))], "relation")) == {
        "what color is the further up star ?": "red",
        "what color is the further down star ?": "blue",
    }


def test_questions_about_two_pictures_need_both() -> None:
    assert dict(questions([HAND_MADE, LINED_UP], "pictures")) == {}
    blue_star = Scene(sprites=(Sprite(4, 4, "star", "blue"), Sprite(1, 1, "heart", "red")))
    assert dict(questions([HAND_MADE, blue_star], "pictures")) == {
        "in the first picture what color is the star ?": "red",
        "in the second picture what color is the star ?": "blue",
    }


def _answers(scenes: tuple[Scene, ...], question: str) -> set[str]:
    """Every answer that a reader of the question could give, found without the code under test."""
    words = question.removesuffix(" ?").split()
    match words:
        case ["what", "number", "is", color]:
            return {f"{n.digits[0]} {n.digits[1]}" for n in scenes[0].numbers if n.color == color}
        case ["how", "many", "shapes", "are", color]:
            return {str(len([s for s in scenes[0].sprites if s.color == color]))}
        case ["what", "color", "is", "the", "further", side, shape]:
            upper, lower = sorted((s for s in scenes[0].sprites if s.shape == shape), key=lambda s: s.row)
            assert upper.row < lower.row
            return {{"up": upper, "down": lower}[side].color}
        case ["in", "the", ordinal, "picture", "what", "color", "is", "the", shape]:
            return {s.color for s in scenes[ordinal == "second"].sprites if s.shape == shape}
        case _:
            raise AssertionError(question)


@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("kind", HARD_KINDS)
def test_every_hard_question_has_one_right_answer(kind: str, heavy: bool) -> None:  # noqa: FBT001
    for index in range(100):
        scenes = draw(kind, generator(0, index), heavy=heavy)
        asked = questions(scenes, kind)
        assert asked
        assert len(dict(asked)) == len(asked)
        for question, answer in asked:
            assert _answers(scenes, question) == {answer}


@pytest.mark.parametrize("kind", [*KINDS, *HARD_KINDS])
def test_nothing_is_drawn_over_another(kind: str) -> None:
    for index in range(50):
        for scene in draw(kind, generator(1, index), heavy=index % 2 == 0):
            drawn = [(d.row, d.col) for d in (*scene.sprites, *scene.numbers)] + sorted(scene.clutter)
            assert len(drawn) == len(set(drawn))
            assert all(0 <= row < 8 and 0 <= col < 8 for row, col in drawn)
            twins = len(scene.sprites) - len({s.shape for s in scene.sprites})
            assert (0 < twins <= 3) if kind == "relation" else twins == 0
            assert len(drawn) == 64 or not scene.heavy


def test_hard_samples_are_deterministic_and_differ_by_seed_and_split() -> None:
    def drawn(seed: int, split: Split) -> list[tuple[str, str, list[bytes]]]:
        stream = samples(8, seed=seed, kinds=HARD_KINDS, split=split, heavy=True)
        return [(s.question, s.answer, [image.tobytes() for image in s.images]) for s in stream]

    assert drawn(0, "held_out") == drawn(0, "held_out")
    pictures = [sample[2][0] for sample in drawn(0, "held_out") + drawn(0, "train") + drawn(1, "held_out")]
    assert len(set(pictures)) == len(pictures)


def test_counts_are_balanced_and_go_up_to_four() -> None:
    answers = [s.answer for s in samples(300, seed=0, kinds=["count"])]
    assert set(answers) == set("01234")
    assert max(answers.count(answer) for answer in "01234") <= 130


def test_two_pictures_are_asked_about_only_where_a_kind_needs_them() -> None:
    assert [len(s.images) for s in samples(8, seed=0, kinds=[*KINDS, *HARD_KINDS])] == [1, 1, 1, 1, 1, 1, 1, 2]


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="known kinds: color_of"):
        questions([HAND_MADE], "size")


def test_digits_are_painted_in_their_cell_and_tell_numbers_apart() -> None:
    def painted(tens: int, ones: int) -> np.ndarray:
        scene = Scene(sprites=(), numbers=(Number(3, 5, (tens, ones), "blue"),))
        return np.asarray(render(scene, generator(0))).astype(int)

    blank = np.asarray(render(Scene(sprites=()), generator(0))).astype(int)
    pictures = {(tens, ones): painted(tens, ones) for tens in range(10) for ones in range(10)}
    assert len({picture.tobytes() for picture in pictures.values()}) == 100
    for picture in pictures.values():
        rows, cols = np.nonzero((picture != blank).any(axis=-1))
        assert rows.min() >= 3 * CELL and rows.max() < 4 * CELL
        assert cols.min() >= 5 * CELL and cols.max() < 6 * CELL
        assert rows.max() - rows.min() == 9


def test_heavy_clutter_has_the_colors_of_sprites() -> None:
    scene = Scene(sprites=(), clutter=frozenset(np.ndindex(8, 8)))
    plain, heavy = (
        np.asarray(render(replace(scene, heavy=heavy), generator(0))).astype(int) for heavy in (False, True)
    )
    assert np.ptp(plain, axis=-1).max() < 25
    assert (np.ptp(heavy, axis=-1) > 100).mean() > 0.02


def test_a_crowded_scene_shows_every_word() -> None:
    scene = crowded_scene(generator(0))
    assert {s.shape for s in scene.sprites} <= set(SHAPES)
    assert {n.digits[0] for n in scene.numbers} | {n.digits[1] for n in scene.numbers} == set(range(10))
    places = [(d.row, d.col) for d in (*scene.sprites, *scene.numbers)] + sorted(scene.clutter)
    assert len(places) == len(set(places))


def test_what_was_missed_is_asked_more_often() -> None:
    missed = {question: 0.0 for question, _ in questions([LINED_UP], "color_of")}
    wanted = "what color is the ring ?"
    rng = generator(0)
    assert {ask([LINED_UP], "color_of", rng, {**missed, wanted: 1.0})[0] for _ in range(20)} == {wanted}


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
