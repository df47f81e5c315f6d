"""Answers as they come, one a line of `answers.jsonl`: what is there is not asked again."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from capa_export.base.errors import CapaError, ExitCode
from capa_export.bundle.store import digest_of
from capa_export.study.evaluate.answers import Answer

__all__ = ["ANSWERS", "Results"]

ANSWERS = "answers.jsonl"
_VERSION = 1


class Results:
    """The answers in a folder, all of one model.

    An answer is keyed by what is asked, and by all that decides what is said to it: model, method, settings, code. So
    settings do not mix, and an answer that comes twice counts once.
    """

    def __init__(self, folder: Path, *, model: str, source: str) -> None:
        """Read what an earlier run left; a line that it had no time to end is dropped.

        Args:
            folder: made if it is not there.
            model: digest.
            source: where the model is from, for people.

        Raises:
            CapaError: the folder holds answers of another model, or what is no answers, or cannot be written, or is
                another run's at the moment.
        """
        self.path = folder / ANSWERS
        self.found: dict[str, Answer] = {}
        header = {"version": _VERSION, "model": model, "source": source}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b", buffering=0)
        except OSError as error:
            raise CapaError(f"{error.filename}: {error.strerror}; choose a folder that can be written") from error
        try:
            self._read(header)
        except BaseException:
            self.close()
            raise

    def _read(self, header: Mapping[str, Any]) -> None:
        try:
            _lock(self._file)
            self._file.seek(0)
            written = self._file.read()
        except BlockingIOError as error:
            raise CapaError(
                f"{self.path}: another run writes to it; wait until it is done, or choose another --out"
            ) from error
        except OSError as error:
            raise CapaError(f"{self.path}: {error.strerror}; choose another --out") from error
        *lines, torn = written.split(b"\n")
        number = 0
        try:
            for number, line in enumerate(lines, 1):
                self._take(json.loads(line), first=number == 1, header=header)
        except (ValueError, TypeError, KeyError) as error:
            raise CapaError(f"{self.path}: line {number} is damaged ({error}); remove it") from error
        self._file.truncate(len(written) - len(torn))
        if not lines:
            self._append([header])

    def _take(self, row: dict[str, Any], *, first: bool, header: Mapping[str, Any]) -> None:
        if not first:
            self.found[row["key"]] = Answer(**row["answer"])
        elif row["version"] != _VERSION:
            raise ValueError(f"version {row['version']}")
        elif row["model"] != header["model"]:
            raise CapaError(
                f"{self.path}: holds answers of another model, {row['source']}; choose another --out", ExitCode.USAGE
            )

    def key(self, question: str, method: str) -> str:
        """The key of an answer, from the digests of the question and of the method."""
        return digest_of([question, method])

    def add(self, question: str, answers: Mapping[str, Answer]) -> None:
        """Keep answers to a question, by their keys, and write them down at once.

        Raises:
            CapaError: the disk is full, or the like.
        """
        self.found.update(answers)
        self._append([{"key": key, "question": question, "answer": asdict(answer)} for key, answer in answers.items()])

    def _append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        lines = "".join(f"{json.dumps(row)}\n" for row in rows).encode()
        try:
            while lines:
                lines = lines[self._file.write(lines) :]
        except OSError as error:
            raise CapaError(f"{self.path}: {error.strerror}; the same command goes on where it stopped") from error

    def close(self) -> None:
        self._file.close()


def _lock(file: BinaryIO) -> None:
    """Keep other processes out until the file is closed, where the system can; raises BlockingIOError if one has it."""
    if sys.platform != "win32":
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
