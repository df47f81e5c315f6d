"""Files that are written whole or not at all."""

import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

__all__ = ["replacing", "write_whole"]


@contextmanager
def replacing(path: Path) -> Generator[BinaryIO, None, None]:
    """A file that takes its name only when it is complete.

    Raises:
        OSError: the folder, which is made, or the file cannot be written; what was there before stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # In a folder of its own the file gets the permissions that the user's umask gives.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        temporary = Path(folder) / path.name
        with temporary.open("wb") as file:
            yield file
        os.replace(temporary, path)


def write_whole(path: Path, text: str) -> None:
    """Write a text in UTF-8.

    Raises:
        OSError: as `replacing`.
    """
    with replacing(path) as file:
        file.write(text.encode())
