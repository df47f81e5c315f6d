"""The layouts of known benchmarks: their columns, their questions and their metrics."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from capa_export.base.errors import CapaError
from capa_export.data.metrics import Metric

__all__ = ["BENCHMARKS", "PLAIN", "Benchmark", "benchmark_of"]

_ONE_WORD = "Answer the question using a single word or phrase."
_LETTER = "Answer with the option's letter from the given choices directly."


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """The layout of a benchmark as lmms-lab or its authors publish it; the instruction is LLaVA-1.5's."""

    name: str
    columns: Collection[str]
    """Columns that tell the benchmark from the others."""
    metric: Metric
    instruction: str = ""
    """Text behind every question."""
    kinds: Sequence[str] = ()
    """Columns that may hold what figures are broken down by; the first that does is taken."""

    def question_text(self, row: Mapping[str, Any]) -> str:
        """The question's text with its options, without the instruction."""
        hint = [_cell(row.get("hint"))] if self.metric == "option" else []
        options = [f"{letter}. {option}" for letter, option in zip(ascii_uppercase, self.options(row), strict=False)]
        return "\n".join(part for part in (*hint, row["question"].strip(), *options) if part)

    def answers(self, row: Mapping[str, Any]) -> list[str]:
        """All right answers of a row; none where it keeps them secret."""
        given, one = row.get("answers"), row.get("answer")
        if isinstance(one, list | dict):
            raise CapaError("answer: must be one; several go under answers")
        if given is None:
            given = [one]
        if not isinstance(given, list):
            raise CapaError("answers: must be a list")
        if any(isinstance(answer, dict) and "answer" not in answer for answer in given):
            raise CapaError("answers: each must be a text, or hold one under answer")
        found = [_text(answer["answer"] if isinstance(answer, dict) else answer) for answer in given]
        # One of ten people who said nothing is one of ten all the same.
        return found if self.metric == "vqa" and any(found) else [answer for answer in found if answer]

    def options(self, row: Mapping[str, Any]) -> list[str]:
        """Options of a multiple-choice question, in the columns A, B, ... or in a list; none for the others."""
        if self.metric != "option":
            return []
        given = row.get("options") or [row.get(letter) for letter in ascii_uppercase]
        if not isinstance(given, list):
            raise CapaError("options: must be a list")
        texts = [_cell(option) for option in given]
        return texts[: texts.index("")] if "" in texts else texts

    def kind_of(self, row: Mapping[str, Any]) -> str:
        for name in self.kinds:
            value: Any = row
            for part in name.split("."):
                value = value.get(part) if isinstance(value, Mapping) else None
            if value is not None:
                return str(value)
        return ""


def _text(value: object) -> str:
    """A cell's text, empty for None and NaN."""
    return "" if value is None or value != value else str(value).strip()  # noqa: PLR0124 - NaN is none.


def _cell(value: object) -> str:
    """A cell's text; a table that was once a .tsv has nan where nothing is written."""
    text = _text(value)
    return "" if text == "nan" else text


PLAIN = Benchmark(name="plain", columns={"question"}, metric="exact", kinds=("kind", "category"))
"""The layout of a user's own questions."""

BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            name="mmbench",
            columns={"question", "answer", "A", "B"},
            metric="option",
            instruction=_LETTER,
            kinds=("category",),
        ),
        Benchmark(
            name="vqav2",
            columns={"question", "answers", "multiple_choice_answer"},
            metric="vqa",
            instruction=_ONE_WORD,
            kinds=("answer_type",),
        ),
        Benchmark(
            name="textvqa", columns={"question", "answers", "image_classes"}, metric="vqa", instruction=_ONE_WORD
        ),
        Benchmark(
            name="gqa",
            columns={"question", "answer", "imageId"},
            metric="exact",
            instruction=_ONE_WORD,
            kinds=("types.structural",),
        ),
        Benchmark(
            name="pope",
            columns={"question", "answer", "image_source"},
            metric="pope",
            instruction=_ONE_WORD,
            kinds=("category",),
        ),
        PLAIN,
    )
}
"""Known benchmarks by name; a table is of the first whose columns it has."""


def benchmark_of(columns: Collection[str], data: Path) -> Benchmark:
    """The first benchmark whose columns a table has.

    Raises:
        CapaError: none has.
    """
    for benchmark in BENCHMARKS.values():
        if set(benchmark.columns) <= set(columns):
            return benchmark
    raise CapaError(f"{data}: asks nothing: it has no column 'question', but {', '.join(sorted(columns))}")
