"""Ends processes with the one that started them, however that ended; with the standard library alone, as in a kit."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

__all__ = ["end_with", "main", "tied"]

_PR_SET_PDEATHSIG = 1


def end_with(parent: int, ending: str = "SIGKILL") -> None:
    """Have the system end this process when its parent ends, however that does; on Linux alone.

    No thread could do it, since libraries may hold Python's lock for minutes.

    Args:
        parent: number of the process that started this one, and may have ended since.
        ending: name of the signal.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.Signals[ending])
        if os.getppid() != parent:
            os._exit(1)


def tied(command: Sequence[str | Path]) -> list[str | Path]:
    """A command that ends with this process, and with it all that it starts; on Linux alone.

    To end it before, send SIGTERM: of SIGKILL what it started would not hear.
    """
    if sys.platform != "linux":
        return [*command]
    return [sys.executable, "-IS", __file__, str(os.getpid()), *command]


def main(parent: str, *command: str) -> int:
    """Run a command in a process group of its own, all of which ends when the process that asks for it does."""
    own = os.getpid()
    # A command in the background of a script ignores Ctrl-C, and so does what it starts.
    ignores = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    endings = [signal.SIGTERM] if ignores else [signal.SIGTERM, signal.SIGINT]
    end_with(int(parent), "SIGTERM")
    # Until there is a group to end.
    signal.pthread_sigmask(signal.SIG_BLOCK, endings)

    def begin() -> None:
        os.setpgid(0, 0)
        end_with(own)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, endings)

    child = subprocess.Popen(command, preexec_fn=begin)  # noqa: PLW1509 - There are no threads.

    def end(*_: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)

    for ending in endings:
        signal.signal(ending, end)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, endings)
    code = child.wait()
    end()
    if code < 0:
        import resource

        # It died of a signal, and so does this process, without a core of its own.
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(own, -code)
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
