"""Ends a command when it is told to: cleanly the first time, at once the second, whatever it is doing."""

import os
import signal
import socket
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from threading import Thread

from capa_export.base.errors import ExitCode
from capa_export.base.progress import say

__all__ = ["Interruption", "interruptible"]

_CODES = {signal.SIGINT: ExitCode.INTERRUPTED, signal.SIGTERM: ExitCode.TERMINATED}
_PATIENCE = 1.0
"""Seconds after which the user is told that the command has not ended yet."""
_SAME = 0.2
"""Seconds within which a signal is the first one again: a terminal and a parent process may both send it."""
_SHOW_CURSOR = "\x1b[?25h"


class Interruption:
    """The signal that a command was sent."""

    code = ExitCode.INTERRUPTED


@contextmanager
def interruptible() -> Generator[Interruption]:
    """Raise KeyboardInterrupt on the first Ctrl-C or SIGTERM, and end the process on the second.

    Python's own handlers wait until the main thread is back in Python, which inside a kernel of ONNX Runtime may take
    minutes. A thread reads here what the system wrote when the signal came.
    """
    told = Interruption()

    def terminate(*_: object) -> None:
        told.code = ExitCode.TERMINATED
        raise KeyboardInterrupt

    reader, writer = socket.socketpair()
    writer.settimeout(0)
    terminated_by = signal.signal(signal.SIGTERM, terminate)
    woken = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    Thread(target=_watch, args=(reader,), daemon=True).start()
    try:
        yield told
    finally:
        signal.set_wakeup_fd(woken)
        signal.signal(signal.SIGTERM, terminated_by)
        writer.close()


def _watch(reader: socket.socket) -> None:
    """End the process at the second signal."""
    first: float | None = None
    with reader:
        while True:
            try:
                received = reader.recv(1)
            except TimeoutError:
                say("interrupted: ends after the step that is running; Ctrl-C once more ends at once")
                reader.settimeout(None)
                continue
            if not received:
                return
            if (code := _CODES.get(signal.Signals(received[0]))) is None:
                continue
            if first is None:
                first = time.monotonic()
                reader.settimeout(_PATIENCE)
            elif time.monotonic() - first > _SAME:
                if sys.stderr.isatty():
                    # Bars of progress hide it.
                    os.write(sys.stderr.fileno(), _SHOW_CURSOR.encode())
                os._exit(code)
