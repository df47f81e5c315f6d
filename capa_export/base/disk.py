"""Room on the disk: asked for before anything is written, and missed in one line where it runs out."""

import errno
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from capa_export.base.errors import CapaError, ExitCode

__all__ = ["check_disk", "disk_guard", "free_bytes"]


def check_disk(folder: Path, needed_bytes: int) -> None:
    """Refuse to write more bytes than the disk has room for.

    Args:
        folder: folder to write to; it need not exist yet.
        needed_bytes: number of bytes to write.

    Raises:
        CapaError: the file system has less than that.
    """
    free = free_bytes(folder)
    if free < needed_bytes:
        raise CapaError(
            f"{folder}: {needed_bytes} bytes are needed, {free} are free; free some, or choose another --out"
        )


def free_bytes(folder: Path) -> int:
    """Free bytes on the file system where a folder is, or will be."""
    places = (folder.absolute(), *folder.absolute().parents)
    return shutil.disk_usage(next(place for place in places if place.exists())).free


@contextmanager
def disk_guard(path: Path, needed: int) -> Generator[None, None, None]:
    """Raise a CapaError where writing `path`, of `needed` bytes, fails in the block."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CapaError(
                f"{path}: the disk filled up: {needed} bytes are needed, {free_bytes(path.parent)} are free; "
                "free some, or choose another --out",
                ExitCode.EXPORT,
            ) from error
        raise CapaError(f"{path}: cannot be written: {error.strerror}", ExitCode.EXPORT) from error
