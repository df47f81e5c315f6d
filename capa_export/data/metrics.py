"""Scores answers: exact match, and the metrics of VQA, POPE and MMBench."""

import re
from collections.abc import Callable, Mapping, Sequence
from string import ascii_uppercase
from typing import Literal

__all__ = ["METRICS", "VQA_ANSWERS", "Metric", "normalise", "option_in", "says_yes", "yes_no_figures"]

Metric = Literal["exact", "vqa", "pope", "option"]

VQA_ANSWERS = 10
"""People who answered each question of VQA and TextVQA."""

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_ARTICLES = {"a", "an", "the"}
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0", **{word: str(number) for number, word in enumerate(_NUMBERS)}}
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's i'd've i'm i've isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't
not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_WHOLE = {word.replace("'", ""): word for word in _CONTRACTIONS.split()}
"""Contraction by its letters without the apostrophe; those that are words without it, as `its`, are not among them."""


def normalise(text: str) -> str:
    """Normalise text as the VQA challenge does: no punctuation, case or articles, and digits (visualqa.org/evaluation).

    Its rule for punctuation is odd and is kept: a mark beside a space vanishes, another one leaves a space, and none
    does where a comma stands between digits.
    """
    given = cleaned = " ".join(text.split())
    no_spaces = re.search(r"\d,\d", given) is not None
    for mark in _PUNCTUATION:
        vanishes = no_spaces or f"{mark} " in given or f" {mark}" in given
        cleaned = cleaned.replace(mark, "" if vanishes else " ")
    cleaned = re.sub(r"\.(?!\d)", "", cleaned)
    words = (_DIGITS.get(word, word) for word in cleaned.lower().split())
    return " ".join(_WHOLE.get(word.replace("'", ""), word) for word in words if word not in _ARTICLES)


def says_yes(text: str) -> bool:
    """Whether POPE reads a text as yes (arXiv 2305.10355): its first sentence holds none of No, no and not."""
    return not {"No", "no", "not"}.intersection(text.partition(".")[0].replace(",", "").split())


def option_in(text: str, options: Sequence[str]) -> str:
    """The letter that an answer to a multiple-choice question names, or whose option it repeats; empty if neither.

    A small letter counts only alone, and a leading A or I not where a word follows, as an article or pronoun does.
    """
    letters = ascii_uppercase[: len(options)]
    said, texts = normalise(text), [normalise(option) for option in options]
    if alone := re.fullmatch(rf"(?i:\W*([{letters}])\W*)", text):
        return alone[1].upper()
    if said in texts:
        return letters[texts.index(said)]
    for pattern in (
        rf"\s*\(?([{letters}])(?:[).:,]|(?<![AI])\s)",
        rf"(?i:.*\banswer(?:\s+is)?)\s*:?\s*\(?([{letters}])\b",
    ):
        if named := re.match(pattern, text):
            return named[1]
    repeated = [
        letter for letter, option in zip(letters, texts, strict=True) if option and f" {option} " in f" {said} "
    ]
    return repeated[0] if len(repeated) == 1 else ""


def _exact(text: str, answers: Sequence[str], _options: Sequence[str]) -> float:
    # An answer that is an article, as the letter A, would be nothing.
    said, *right = (normalise(part) or part.strip().lower() for part in (text, *answers))
    return float(said in right)


def _vqa(text: str, answers: Sequence[str], _options: Sequence[str]) -> float:
    """min(people who said so / 3, 1), the mean over the people left out in turn."""
    same = [normalise(answer) == normalise(text) for answer in answers]
    return sum(min((sum(same) - left_out) / 3, 1.0) for left_out in same) / len(same)


def _pope(text: str, answers: Sequence[str], _options: Sequence[str]) -> float:
    return float(says_yes(text) == says_yes(answers[0]))


def _option(text: str, answers: Sequence[str], options: Sequence[str]) -> float:
    return float(option_in(text, options) == answers[0].strip().upper())


METRICS: Mapping[Metric, Callable[[str, Sequence[str], Sequence[str]], float]] = {
    "exact": _exact,
    "vqa": _vqa,
    "pope": _pope,
    "option": _option,
}
"""Score 0 to 1 of an answer, from the right ones and the options."""


def yes_no_figures(said: Sequence[bool], true: Sequence[bool]) -> dict[str, float]:
    """POPE's precision, recall, F1 and yes ratio, of at least one question; 0 where the denominator is."""
    hits = sum(one and other for one, other in zip(said, true, strict=True))
    precision, recall = hits / max(sum(said), 1), hits / max(sum(true), 1)
    return {
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if hits else 0.0,
        "yes_ratio": sum(said) / len(said),
    }
