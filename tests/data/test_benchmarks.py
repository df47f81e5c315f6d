"""Rows of the known benchmarks: what is asked, what is right, and by what figures are broken down."""

from pathlib import Path
from typing import Any

import pytest

from capa_export.base.errors import CapaError
from capa_export.data.benchmarks import BENCHMARKS, PLAIN, benchmark_of
from capa_export.data.metrics import METRICS

NAN = float("nan")


def test_each_is_told_by_its_own_columns() -> None:
    for benchmark in BENCHMARKS.values():
        assert benchmark_of({*benchmark.columns, "image"}, Path("x")) is benchmark
        assert benchmark.metric in METRICS
    with pytest.raises(CapaError, match="x: asks nothing: it has no column 'question', but image, text"):
        benchmark_of(["text", "image"], Path("x"))


@pytest.mark.parametrize(
    ("name", "row", "text"),
    [
        ("plain", {"question": " what ? ", "A": "x"}, "what ?"),
        ("mmbench", {"question": "what ?", "A": "a cat", "B": "a dog"}, "what ?\nA. a cat\nB. a dog"),
        (
            "mmbench",
            {"question": "what ?", "hint": "look", "A": "x", "B": "y", "C": "nan", "D": "z"},
            "look\nwhat ?\nA. x\nB. y",
        ),
        ("mmbench", {"question": "what ?", "hint": NAN, "options": ["x", 2]}, "what ?\nA. x\nB. 2"),
    ],
)
def test_questions(name: str, row: dict[str, Any], text: str) -> None:
    assert BENCHMARKS[name].question_text(row) == text


@pytest.mark.parametrize(
    ("name", "row", "answers"),
    [
        ("plain", {"answer": " red "}, ["red"]),
        ("plain", {"answer": 3}, ["3"]),
        ("plain", {"answer": None}, []),
        ("plain", {"answer": NAN}, []),
        ("plain", {"answers": ["red", "", "blue"]}, ["red", "blue"]),
        ("vqav2", {"answers": [{"answer": "red"}, {"answer": ""}]}, ["red", ""]),
        ("vqav2", {"answers": ["", ""]}, []),
    ],
)
def test_answers(name: str, row: dict[str, Any], answers: list[str]) -> None:
    assert BENCHMARKS[name].answers(row) == answers


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"answer": ["a", "b"]}, "answer: must be one; several go under answers"),
        ({"answers": "red"}, "answers: must be a list"),
        ({"answers": [{"text": "red"}]}, "answers: each must be a text, or hold one under answer"),
    ],
)
def test_wrong_answers(row: dict[str, Any], problem: str) -> None:
    with pytest.raises(CapaError, match=problem):
        PLAIN.answers(row)


def test_options_must_be_a_list_where_there_are_any() -> None:
    with pytest.raises(CapaError, match="options: must be a list"):
        BENCHMARKS["mmbench"].options({"options": "a, b"})
    assert PLAIN.options({"options": "a, b"}) == []


@pytest.mark.parametrize(
    ("name", "row", "kind"),
    [
        ("plain", {"kind": "color", "category": "x"}, "color"),
        ("plain", {"kind": None, "category": 3}, "3"),
        ("gqa", {"types": {"structural": "verify"}}, "verify"),
        ("gqa", {"types": "verify"}, ""),
        ("textvqa", {"kind": "color"}, ""),
    ],
)
def test_kinds(name: str, row: dict[str, Any], kind: str) -> None:
    assert BENCHMARKS[name].kind_of(row) == kind
