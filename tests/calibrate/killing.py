"""A command that kills its own process once so many steps are measured."""

import os
import signal
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from capa_export.calibrate import measure
from capa_export.cli import main
from tests.forked import FORKED

__all__ = ["killed"]


def killed(arguments: Sequence[str], steps: int) -> tuple[int, int]:
    """Run in a process that kills itself after so many steps; its exit code, and its steps if it came to the end."""
    receiver, sender = FORKED.Pipe(duplex=False)
    process = FORKED.Process(target=_run, args=(list(arguments), steps, sender))
    process.start()
    sender.close()
    process.join()
    assert process.exitcode is not None
    return process.exitcode, receiver.recv() if process.exitcode == 0 else 0


def _run(arguments: list[str], last: int, sender: Connection) -> None:
    done, add = 0, measure.Measurement.add

    def counted(*given: Any) -> None:
        nonlocal done
        if done == last:
            os.kill(os.getpid(), signal.SIGKILL)
        add(*given)
        done += 1

    measure.Measurement.add = counted
    code = main(arguments)
    sender.send(done)
    sender.close()
    raise SystemExit(code)
