"""One command at a time in one bundle folder; the second is told which process has it."""

import os
import shlex
import sys
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from capa_export.errors import CapaError

__all__ = ["LOCK", "locked"]

LOCK = ".lock.partial"
"""Hidden, and named as what an interruption leaves behind, so that it makes no folder somebody's own."""


@contextmanager
def locked(folder: Path) -> Generator[None]:
    """Hold a folder that exists until the block ends; blocks of one process may be nested.

    The system frees the lock of a process that dies, however it does.

    Raises:
        CapaError: another process holds it.
    """
    from filelock import FileLock, Timeout

    path = folder.resolve() / LOCK
    lock = FileLock(path, is_singleton=True, thread_local=False, blocking=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise CapaError(
            f"{folder}: {_holder(path)} is at work in it; wait until it has ended, or choose another folder"
        ) from error
    outermost = lock.lock_counter == 1
    try:
        if outermost:
            path.write_text(f"process {os.getpid()} ({shlex.join(sys.argv)})", encoding="utf-8")
        yield
    finally:
        if outermost:
            # While it is still held, since it may be another's right after.
            with suppress(OSError):
                path.unlink()
        lock.release()


def _holder(path: Path) -> str:
    with suppress(OSError, UnicodeDecodeError):
        return path.read_text(encoding="utf-8") or "another command"
    return "another command"
