"""Writing of files whole or not at all, and digests that tell one file from another."""

import errno
import hashlib
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from capa_export.base.errors import CapaError, ExitCode

__all__ = [
    "PARTIAL",
    "file_digest",
    "fingerprint",
    "is_special",
    "refuse_special",
    "remove",
    "replacing",
    "sync",
    "sync_tree",
    "user_cache",
    "write_whole",
]

PARTIAL = ".partial"
"""Ending of the names of what is being written."""
_SYNCS = 16
"""Files that are synced at a time: a file system puts several on the disk in little more time than one."""


@contextmanager
def replacing(path: Path) -> Generator[BinaryIO, None, None]:
    """Open a file that takes its name only when it is complete and on the disk.

    Raises:
        OSError: the folder, which is made, or the file cannot be written; an older file stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # In a folder of its own the file gets the permissions that the user's umask gives.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.", suffix=PARTIAL) as folder:
        temporary = Path(folder) / path.name
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    sync(path.parent)


def write_whole(path: Path, text: str) -> None:
    """Write a text in UTF-8, whole or not at all.

    Raises:
        OSError: the file or its folder cannot be written; an older file stays.
    """
    with replacing(path) as file:
        file.write(text.encode())


def sync(path: Path) -> None:
    """Put a file's bytes or a folder's names on the disk before anything that follows, where the system can."""
    if sys.platform == "win32":
        # It opens no folder, and syncs no file that is open for reading.
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems sync files, but no folders.
        if error.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Put all that lies in a folder on the disk, and what it is called."""
    below = [path for path in folder.rglob("*") if not path.is_symlink()]
    with ThreadPoolExecutor(_SYNCS) as pool:
        for _ in pool.map(sync, [*below, folder]):
            pass


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there; the target of a link stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        # A pipe, too, which nobody may wait for.
        path.unlink(missing_ok=True)


def is_special(path: Path) -> bool:
    """Whether there is a pipe, a socket or a device at a path, which to read might never end."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def refuse_special(path: Path) -> None:
    """Refuse what to read might never end, before it is opened.

    Raises:
        CapaError: there is a pipe, a socket or a device at the path.
    """
    if is_special(path):
        raise CapaError(f"{path}: is a pipe, a socket or a device; name a file", ExitCode.USAGE)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fingerprint(path: Path) -> dict[str, int | str]:
    """Size, time of the last change, and SHA-256: of the header of a safetensors file, of the whole of any other."""
    status = path.stat()
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little") if path.suffix == ".safetensors" else status.st_size
        header = hashlib.sha256(file.read(length)).hexdigest()
    return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "header_sha256": header}


def user_cache(name: str) -> Path:
    """The folder of the user's cache for one kind of file; it need not exist."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111 - fails nowhere.
    return Path(cache) / "capa-export" / name
