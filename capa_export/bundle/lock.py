"""Lets one command at a time into a bundle folder; a second is told which process is there."""

import os
import shlex
import sys
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from capa_export.base.errors import CapaError
from capa_export.base.files import remove

__all__ = ["LOCK", "LOCK_FILES", "locked"]

LOCK = ".lock.partial"
"""Hidden, and named as what an interruption leaves behind, so that it makes no folder somebody's own."""
_HOLDER = ".holder.partial"
"""Says who holds the lock; not the lock itself, which Windows keeps even its own process from writing."""
LOCK_FILES = (LOCK, _HOLDER)
_PATIENCE = 0.2
"""Seconds, within which a command comes to its end and one that reads a bundle has put it in order."""


@contextmanager
def locked(folder: Path) -> Generator[bool]:
    """Hold a folder that exists until the block ends; blocks of one process may be nested.

    The system frees the lock of a process that dies, however it does.

    Yields:
        Whether this is the outermost block of this process.

    Raises:
        CapaError: another process holds it, or it cannot be written.
    """
    from filelock import FileLock, Timeout

    path, holder = folder.resolve() / LOCK, folder.resolve() / _HOLDER
    lock = FileLock(path, is_singleton=True, thread_local=False, timeout=_PATIENCE)
    if path.is_symlink():
        # Somebody else's doing: a lock is a file.
        path.unlink()
    try:
        lock.acquire()
    except Timeout as error:
        raise CapaError(
            f"{folder}: {_read_holder(holder)} is at work in it; wait until it has ended, or choose another folder"
        ) from error
    except OSError as error:
        raise CapaError(f"{folder}: {error.strerror}; choose a folder that can be written") from error
    outermost = lock.lock_counter == 1
    try:
        if outermost:
            command = f"process {os.getpid()} ({shlex.join(sys.argv)})"
            remove(holder)
            # Arguments need not be UTF-8.
            holder.write_text(command, encoding="utf-8", errors="backslashreplace")
        yield outermost
    finally:
        if outermost:
            # While it is still held, since it may be another's right after.
            for file in (holder, path):
                with suppress(OSError):
                    file.unlink()
        lock.release()


def _read_holder(path: Path) -> str:
    with suppress(OSError, UnicodeDecodeError):
        return path.read_text(encoding="utf-8") or "another command"
    return "another command"
