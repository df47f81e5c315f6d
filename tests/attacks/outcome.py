"""Runs command lines in a process of its own, with limits of time and memory, and says how each ended."""

import os
import re
import resource
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from capa_export.base.errors import ExitCode
from capa_export.cli import main
from tests.forked import FORKED
from tests.fuzz.readers import OBEYED

__all__ = ["Outcome", "outcome_of", "outcomes"]

_SECONDS = 30
"""Of processor time, for a command that refuses or answers in three at most."""
_WAITING = 240
"""Seconds by the clock, of which a command spends most in waiting for the processor where others are at work."""
_MEMORY = 4 << 30
"""Bytes beyond what the libraries map when they are loaded; the commands take half of one GB."""
_OUT_OF_MEMORY = re.compile(
    r"MemoryError|Unable to allocate|bad[_ ]alloc|annot allocate memory|can't allocate|ailed to allocate|out of memory"
)
"""What Python, NumPy, C++, the system, torch, ONNX Runtime and others say where the limit ends them, in any line."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a command ended."""

    verdict: Literal["refused", "accepted", "traceback", "hang", "raw", "memory"]
    """Refused in one line; accepted; a traceback; ended by a limit of time; control characters shown; refused by the
    limit of memory here and by nothing else, in however many lines."""
    code: int | None
    text: str
    """What the command wrote, both streams."""


def outcomes(commands: Sequence[Sequence[object]], place: Path) -> list[Outcome]:
    """How command lines end, one after the other.

    Args:
        commands: each as its words.
        place: a folder for what they write to their streams.
    """
    found: list[Outcome] = []
    while len(found) < len(commands):
        rest = [[str(word) for word in command] for command in commands[len(found) :]]
        process = FORKED.Process(target=_run, args=(rest, place, len(found)))
        process.start()
        process.join()
        ended = len(list(place.glob("*.code")))
        found += [outcome_of(place, number) for number in range(len(found), ended)]
        if ended < len(commands):
            text = (place / f"{ended}.text").read_text(encoding="utf-8", errors="replace")
            found.append(Outcome("hang", process.exitcode, text))
            (place / f"{ended}.code").touch()
    return found


def outcome_of(place: Path, number: int) -> Outcome:
    """How the command of this number ended, by what it left in the folder."""
    text = (place / f"{number}.text").read_text(encoding="utf-8", errors="replace")
    written = (place / f"{number}.code").read_text()
    if not written:
        return Outcome("hang", None, text)
    code = int(written)
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    if _OUT_OF_MEMORY.search(text):
        return Outcome("memory", code, text)
    if "Traceback" in text or (code and len(lines) != 1 and "Usage:" not in text):
        return Outcome("traceback", code, text)
    if OBEYED.search(text):
        return Outcome("raw", code, text)
    return Outcome("refused" if code in set(ExitCode) - {ExitCode.OK} else "accepted", code, text)


def _run(commands: list[list[str]], place: Path, first: int) -> None:
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + _MEMORY, mapped + _MEMORY))
    for number, command in enumerate(commands, first):
        descriptor = os.open(place / f"{number}.text", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.close(descriptor)
        sys.stdout = open(1, "w", encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115 - A descriptor.
        sys.stderr = open(2, "w", encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115 - As above.
        # The system ends the process: no library can swallow that.
        signal.setitimer(signal.ITIMER_PROF, _SECONDS)
        signal.setitimer(signal.ITIMER_REAL, _WAITING)
        try:
            code = main(command)
        except BaseException:  # noqa: BLE001 - That there is one is what is looked for.
            traceback.print_exc()
            code = 1
        for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
            signal.setitimer(timer, 0)
        sys.stdout.flush()
        sys.stderr.flush()
        (place / f"{number}.code").write_text(str(int(code)))
    os._exit(0)
