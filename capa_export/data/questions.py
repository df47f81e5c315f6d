"""Questions about pictures with their right answers: lines of a .jsonl file, rows of a dataset, or pictures alone."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from capa_export.base.errors import CapaError, ExitCode
from capa_export.data.benchmarks import BENCHMARKS, PLAIN, Benchmark, benchmark_of
from capa_export.data.conversation import Message
from capa_export.data.folders import Table, is_dataset, open_folder
from capa_export.data.metrics import VQA_ANSWERS
from capa_export.data.picture_files import open_picture
from capa_export.data.picture_sources import EncodedPicture, picture_bytes
from capa_export.data.sources import find_source, read_line, read_lines, wrong_line
from capa_export.model.prompt import Turn

__all__ = ["Question", "Questions", "questions_from"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A conversation up to a question."""

    id: str
    turns: Sequence[tuple[str, Sequence[str | EncodedPicture]]]
    """Role and content of each turn."""
    answers: Sequence[str]
    """Right answers, any of which will do; a metric may count them. Empty where none is known."""
    kind: str = ""
    """Kind of question, by which figures are broken down."""
    options: Sequence[str] = ()
    """Options of a multiple-choice question, A first; its answer is a letter."""

    def digest(self) -> str:
        """Digest of the turns; the right answers have no part in what a model says."""
        digest = hashlib.sha256()
        for role, content in self.turns:
            for part in (role, *content):
                data = part.data if isinstance(part, EncodedPicture) else part.encode()
                digest.update(f"{'text' if isinstance(part, str) else 'picture'} {len(data)} ".encode() + data)
        return digest.hexdigest()

    def open(self) -> list[Turn]:
        """Decode the pictures of the conversation.

        Raises:
            CapaError: one of them does not decode.
        """
        return [
            Turn(
                role,
                [
                    open_picture(Path(part.name), part.data) if isinstance(part, EncodedPicture) else part
                    for part in content
                ],
            )
            for role, content in self.turns
        ]


@dataclass(frozen=True, kw_only=True)
class Questions:
    """Questions that are read row by row."""

    name: str
    """Name for people: the file or folder, and the part of it."""
    benchmark: Benchmark
    rows: Sequence[int]
    """Row numbers in the whole file or folder."""
    read: Callable[[int], Question]
    """Reads the question of a row; raises CapaError where it cannot be asked."""


def questions_from(
    data: Path,
    *,
    benchmark: str | None = None,
    split: str | None = None,
    instruction: str | None = None,
    question: str = "",
    limit: int | None = None,
    seed: int = 0,
) -> Questions:
    """The rows of a .jsonl file, or of a dataset's folder, or pictures that are all asked the same.

    Args:
        data: lines as `{"image": ..., "question": ..., "answer": ...}` or `{"messages": [...], "answer": ...}`, paths
            relative to the file; or what `save_to_disk` wrote; or a snapshot of parquet files; or pictures, as
            `find_source` takes them.
        benchmark: how to read and score the rows; None to tell by the columns.
        split: part of a folder that has several.
        instruction: said behind every question; None for the benchmark's own.
        question: asked of pictures that come without one.
        limit: so many rows, drawn at random; those of a smaller limit are among them.
        seed: of the draw.

    Raises:
        CapaError: there is nothing to read, or it is not told what of it.
    """
    if benchmark is not None and benchmark not in BENCHMARKS:
        raise CapaError(f"unknown benchmark {benchmark!r}; known: {', '.join(BENCHMARKS)}", ExitCode.USAGE)
    chosen = PLAIN if benchmark is None else BENCHMARKS[benchmark]
    place = None if is_dataset(data) else find_source(data)
    if place is not None and split is not None:
        raise CapaError("--split is for folders of datasets, which have parts", ExitCode.USAGE)
    if isinstance(place, Path):
        lines = read_lines(place)
        count, name = len(lines), str(place)
        read = partial(_of_line, place, lines, chosen, _instruction(chosen, instruction))
    elif place is not None:
        if not question:
            raise CapaError(f"{data}: holds pictures without a question; give a .jsonl file of both", ExitCode.USAGE)
        asked = "\n".join(part for part in (question, _instruction(chosen, instruction)) if part)
        count, name = len(place), str(data)
        read = partial(_of_picture, place, asked)
    else:
        table = open_folder(data, split)
        chosen = benchmark_of(table.columns, data) if benchmark is None else BENCHMARKS[benchmark]
        if missing := sorted(set(chosen.columns) - set(table.columns)):
            raise CapaError(
                f"{data}: is no {chosen.name}: it has no column {missing[0]!r}, but {', '.join(sorted(table.columns))}"
            )
        count, name = len(table), table.name
        if not count:
            raise CapaError(f"{name}: has no rows")
        read = partial(_of_row, table, chosen, _instruction(chosen, instruction))
    rows = np.random.default_rng(seed).permutation(count)[:limit] if limit is not None else np.arange(count)
    return Questions(name=name, benchmark=chosen, rows=sorted(rows.tolist()), read=read)


def _instruction(benchmark: Benchmark, given: str | None) -> str:
    return benchmark.instruction if given is None else given


def _of_line(
    path: Path, lines: Sequence[tuple[int, str]], benchmark: Benchmark, instruction: str, index: int
) -> Question:
    number, text = lines[index]
    line = read_line(path, number, text, videos=False)
    row = line.row
    with wrong_line(path, number, conversation="messages" in row):
        turns = _turns(line.messages, path.parent)
        if "messages" not in row:
            pictures = [part for part in turns[0][1] if isinstance(part, EncodedPicture)]
            turns = _one_turn(row, benchmark, pictures, instruction)
        elif instruction:
            turns[-1] = (turns[-1][0], [*turns[-1][1], f"\n{instruction}"])
        return _question(row, benchmark, row.get("id", f"line {number}"), turns)


def _of_picture(paths: Sequence[Path], question: str, index: int) -> Question:
    picture = picture_bytes(paths[index].name, paths[index].parent)
    return Question(id=str(paths[index]), turns=[("user", [picture, question])], answers=())


def _of_row(table: Table, benchmark: Benchmark, instruction: str, index: int) -> Question:
    row = table.row(index)
    named = next((row[name] for name in ("question_id", "id", "index") if row.get(name) is not None), f"row {index}")
    pictures = [EncodedPicture(f"{named}", data) for data in table.pictures(row)]
    return _question(row, benchmark, named, _one_turn(row, benchmark, pictures, instruction))


def _one_turn(
    row: dict[str, Any], benchmark: Benchmark, pictures: Sequence[EncodedPicture], instruction: str
) -> Sequence[tuple[str, Sequence[str | EncodedPicture]]]:
    if not isinstance(row.get("question"), str) or not row["question"].strip():
        raise CapaError("asks no question")
    text = "\n".join(part for part in (benchmark.question_text(row), instruction) if part)
    return [("user", [*pictures, text])]


def _turns(messages: Sequence[Message], folder: Path) -> list[tuple[str, Sequence[str | EncodedPicture]]]:
    """The turns of messages without videos."""

    def read(message: Message) -> list[str | EncodedPicture]:
        parts = (part for part in message.content if part.type != "video")
        return [part.text if part.type == "text" else picture_bytes(part.source, folder) for part in parts]

    return [(message.role, read(message)) for message in messages]


def _question(
    row: dict[str, Any],
    benchmark: Benchmark,
    named: object,
    turns: Sequence[tuple[str, Sequence[str | EncodedPicture]]],
) -> Question:
    if not any(isinstance(part, EncodedPicture) for _, content in turns for part in content):
        raise CapaError("shows no picture")
    answers = benchmark.answers(row)
    if benchmark.metric == "vqa" and answers and len(answers) != VQA_ANSWERS:
        raise CapaError(f"has {len(answers)} answers, and VQA accuracy is of {VQA_ANSWERS}")
    options = benchmark.options(row)
    if benchmark.metric == "option" and not options:
        raise CapaError("has no options")
    return Question(id=str(named), turns=turns, answers=answers, kind=str(benchmark.kind_of(row)), options=options)
