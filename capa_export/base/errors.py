"""The one exception a user's mistake raises, and the exit codes of the command line."""

import re
from collections.abc import Generator
from contextlib import contextmanager
from enum import IntEnum

__all__ = ["CapaError", "ExitCode", "NotFiniteError", "first_line", "harmless", "how_to_install", "refusing"]

_OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but for tab and line end, separators, changes of direction, and halves of characters."""
_SHOWN = 400
"""Characters of a library's message that an error repeats: some list every tensor, or every character of a file."""


class ExitCode(IntEnum):
    """Exit codes of the process; CI may rely on these numbers."""

    OK = 0
    USAGE = 2
    """A bad option, an unknown model or target, an unreadable recipe."""
    PREFLIGHT = 3
    """The inputs cannot give a good bundle: checkpoint, calibration pictures, disk, memory."""
    EXPORT = 4
    """Writing the graphs or their weights failed."""
    ENGINE = 5
    """TensorRT refused or crashed."""
    PARITY = 6
    """The artefacts do not compute what the eager model computes."""
    METHOD = 7
    """The artefacts are right, and the method changes more answers than its bound allows."""
    INTERRUPTED = 130
    TERMINATED = 143


class CapaError(Exception):
    """A failure the user can act on: one line that says what is wrong, where, and what would do."""

    def __init__(self, message: str, code: ExitCode = ExitCode.PREFLIGHT) -> None:
        super().__init__(printable(message))
        self.code = code


class NotFiniteError(CapaError):
    """The model yields NaN or infinity, so that no measurement of it is of use."""


def printable(text: str) -> str:
    """A text in one line, with every character written out that is not simply shown."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _escaped(char) for char in text)


def harmless(text: str) -> str:
    """A text of several lines, with the characters written out that a terminal obeys, or that turn its direction."""
    return _OBEYED.sub(lambda match: _escaped(match[0]), text)


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode()


def first_line(error: BaseException | str) -> str:
    """The first line of a library's message that says something, or else the name of the error."""
    lines = (line.strip().rstrip(":") for line in str(error).splitlines())
    line = next(filter(None, lines), type(error).__name__)
    return line if len(line) <= _SHOWN else f"{line[:_SHOWN]}..."


@contextmanager
def refusing(problem: str, remedy: str = "") -> Generator[None]:
    """The boundary to a library that reads what somebody else wrote: whatever it raises becomes one line.

    Args:
        problem: the file, and what is not done with it.
        remedy: what would do.

    Raises:
        CapaError: the block raises any error.
    """
    try:
        yield
    except CapaError:
        raise
    except BaseException as error:
        # What a library raises on a malformed file, it does not say; one in Rust may panic, which is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CapaError(f"{problem}: {first_line(error)}{f'; {remedy}' if remedy else ''}") from error


def how_to_install(extra: str) -> str:
    """The command that adds one of the package's extras, which no registry has under the package's name."""
    return f'pip install ".[{extra}]" in a checkout of capa-export'
