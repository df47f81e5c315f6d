"""Remembers which files were read and found to have their digest, so that large ones are not read at every start.

A stamp is a file's size, time and inode. It shows a change that happened; it does not show one that was hidden, since
whoever can write a file can set its time back. Stamps belong to a machine and a user, and lie in the user's cache: a
copy of a bundle has none, nor can a bundle bring any along.
"""

import hashlib
import json
import os
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from capa_export.base.files import file_digest, user_cache, write_whole

if TYPE_CHECKING:
    from collections.abc import Generator

__all__ = ["Stamps"]

_SETTLED_NS = 100_000_000
"""Age from which on a rewritten file is sure to get another time: clocks of file systems are coarse."""


class Stamps:
    """The stamps of one folder's files."""

    def __init__(self, folder: Path, *, read_all: bool = False) -> None:
        self.folder, self.read_all = folder, read_all
        self.num_unread = 0
        """Number of files that were trusted by their stamps."""
        # The folder's own path, so that a copy of it starts anew.
        name = hashlib.sha256(os.fsencode(os.path.realpath(folder))).hexdigest()
        self._path = user_cache("stamps") / f"{name}.json"
        self._known = self._read()
        self._stored = dict(self._known)

    def matches(self, path: Path, sha256: str) -> bool:
        """Whether a file below the folder has this digest; it is read unless its stamp says so."""
        name, before = path.relative_to(self.folder).as_posix(), _stamp(path)
        if not self.read_all and self._known.get(name) == [*before, sha256]:
            self.num_unread += 1
            return True
        self._known.pop(name, None)
        if file_digest(path) != sha256:
            return False
        if _stamp(path) == before and time.time_ns() - before[1] > _SETTLED_NS:
            self._known[name] = [*before, sha256]
        return True

    @classmethod
    @contextmanager
    def of(cls, folder: Path, *, read_all: bool = False) -> "Generator[Stamps]":
        """The stamps of a folder's files, kept for the next command when the block ends, also by a refusal."""
        stamps = cls(folder, read_all=read_all)
        try:
            yield stamps
        finally:
            if stamps._known != stamps._stored:
                # Where the cache cannot be written, the next command reads the files again.
                with suppress(OSError):
                    write_whole(stamps._path, json.dumps(stamps._known))

    def _read(self) -> dict[str, Any]:
        try:
            known = json.loads(self._path.read_bytes())
        except (OSError, ValueError, RecursionError):
            return {}
        return cast("dict[str, Any]", known) if isinstance(known, dict) else {}


def _stamp(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino
