"""The one exception a user's mistake raises, and the exit codes of the command line."""

from enum import IntEnum

__all__ = ["CapaError", "ExitCode", "NotFiniteError", "how_to_install"]


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
        # What is quoted from a file may hold line ends and control characters.
        super().__init__(
            "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in message)
        )
        self.code = code


class NotFiniteError(CapaError):
    """The model yields NaN or infinity, so that no measurement of it is of use."""


def how_to_install(extra: str) -> str:
    """The command that adds one of the package's extras, which no registry has under the package's name."""
    return f'pip install ".[{extra}]" in a checkout of capa-export'
