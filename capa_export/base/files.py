"""Writing of files whole or not at all, and digests that tell one file from another."""

import hashlib
import os
import stat
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

__all__ = ["file_digest", "fingerprint", "is_special", "replacing", "user_cache", "write_whole"]


@contextmanager
def replacing(path: Path) -> Generator[BinaryIO, None, None]:
    """Open a file that takes its name only when it is complete.

    Raises:
        OSError: the folder, which is made, or the file cannot be written; an older file stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # In a folder of its own the file gets the permissions that the user's umask gives.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        temporary = Path(folder) / path.name
        with temporary.open("wb") as file:
            yield file
        os.replace(temporary, path)


def write_whole(path: Path, text: str) -> None:
    """Write a text in UTF-8, whole or not at all.

    Raises:
        OSError: the file or its folder cannot be written; an older file stays.
    """
    with replacing(path) as file:
        file.write(text.encode())


def is_special(path: Path) -> bool:
    """Whether there is a pipe, a socket or a device at a path, which to read might never end."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


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
