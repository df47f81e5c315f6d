"""Metrics against cases worked out by hand from their public definitions."""

import pytest

from capa_export.data.metrics import (
    METRICS,
    normalise,
    option_in,
    says_yes,
    yes_no_figures,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Dog.", "dog"),
        ("two  cats\n", "2 cats"),
        ("None", "0"),
        ("dont", "don't"),
        ("don't", "don't"),
        ("its", "its"),
        ("well", "well"),
        ("12.5", "12.5"),
        ("3.", "3"),
        ("1,000", "1000"),
        ("red/blue", "red blue"),
        ("red / blue", "red blue"),
        ("t-shirt", "t shirt"),
        ("yes, it is", "yes it is"),
        ("1,000-2,000", "10002000"),
        ("an apple a day", "apple day"),
        ("'twas", "'twas"),
        ("", ""),
    ],
)
def test_normalised(text: str, expected: str) -> None:
    assert normalise(text) == expected


@pytest.mark.parametrize(
    ("agreeing", "expected"),
    # With m of ten people: one of the m is left out m times, and then m - 1 are left.
    [
        (0, 0.0),
        (1, (9 * 1 / 3) / 10),
        (2, (2 * 1 / 3 + 8 * 2 / 3) / 10),
        (3, (3 * 2 / 3 + 7) / 10),
        (4, 1.0),
        (10, 1.0),
    ],
)
def test_vqa_accuracy_leaves_each_person_out(agreeing: int, expected: float) -> None:
    answers = ["A dog."] * agreeing + ["cat"] * (10 - agreeing)
    assert METRICS["vqa"]("dog", answers, []) == pytest.approx(expected)


def test_exact_match_takes_any_of_the_answers() -> None:
    assert METRICS["exact"]("The 2 dogs", ["cats", "two dogs"], []) == 1
    assert METRICS["exact"]("dog", ["dogs"], []) == 0
    assert METRICS["exact"]("A", ["a"], []) == 1
    assert METRICS["exact"]("", ["a"], []) == 0


@pytest.mark.parametrize(
    ("text", "yes"),
    [
        ("Yes", True),
        ("yes, there is.", True),
        ("No", False),
        ("no, there is none", False),
        ("There is not a dog", False),
        ("Yes. No more", True),
        ("Nothing there", True),
    ],
)
def test_pope_reads_the_first_sentence(text: str, *, yes: bool) -> None:
    assert says_yes(text) == yes
    assert METRICS["pope"](text, ["yes"], []) == yes


def test_pope_figures() -> None:
    said, true = [True, True, True, False, False], [True, True, False, True, False]
    found = yes_no_figures(said, true)
    assert found == pytest.approx({"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "yes_ratio": 0.6})
    assert yes_no_figures([False], [True]) == {"precision": 0, "recall": 0, "f1": 0, "yes_ratio": 0}


OPTIONS = ["a red dog", "blue", "Cat", "none of them"]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(B)", "B"),
        ("b", "B"),
        ("b.", "B"),
        ("(a)", "A"),
        ("B cat", "B"),
        ("B. blue", "B"),
        ("B) blue", "B"),
        (" B: blue", "B"),
        ("blue", "B"),
        ("Blue.", "B"),
        ("The answer is C.", "C"),
        ("Answer: (C)", "C"),
        ("A red dog", "A"),
        ("A", "A"),
        ("It is a cat.", "C"),
        ("a cat", "C"),
        ("A cat", "C"),
        ("b cat", "C"),
        ("a cat, or blue", ""),
        ("A man", ""),
        ("a man", ""),
        ("E", ""),
        ("", ""),
    ],
)
def test_option(text: str, letter: str) -> None:
    assert option_in(text, OPTIONS) == letter
    assert METRICS["option"](text, ["B"], OPTIONS) == METRICS["option"](text, ["b"], OPTIONS) == (letter == "B")


def test_a_pronoun_is_no_option() -> None:
    nine = [f"number {index}" for index in range(9)]
    assert option_in("I", nine) == "I"
    assert option_in("I see number 4.", nine) == "E"
