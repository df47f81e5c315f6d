"""Puts what a device built into its kit, all of it in one step; with the standard library alone, as in a kit.

New files lie in `.building` until all of them have passed and are on the disk. Then the folder is renamed to `.built`:
from then on they count. `_finish` does what is left, as often as it is cut short: it removes every file of the engines
before, so that engines of two builds never lie side by side, and moves the new ones into their places.
"""

import os
import shutil
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING or __package__:
    from capa_export.trt.kit_file import KitError, check_places
else:
    # Beside this file in a kit.
    from kit_file import KitError, check_places

__all__ = ["LIBRARY", "OUTPUTS", "UNCHECKED", "claimed", "places", "replaced"]

UNCHECKED = ".engine.unchecked"
"""Ending of the name of an engine that the golden run has not passed."""
OUTPUTS = (".engine", UNCHECKED, ".log", ".layers.txt", ".layers.json")
"""Endings of the names of what is written of an engine."""
LIBRARY = "libcapa_plugins.so"
_BUILDING, _BUILT = ".building", ".built"
_OLD = "old"
"""File in `.built` that says that what is in the places may be of the build before."""


def places(engines: Iterable[str]) -> list[str]:
    """Names of all that a build may leave in a kit."""
    return [LIBRARY, *(f"{name}{ending}" for name in engines for ending in OUTPUTS)]


@contextmanager
def claimed(kit: Path, engines: Iterable[str]) -> Generator[None]:
    """Keep other builds out of a kit until the block ends, and put in order what one that was cut short has left.

    The system frees the lock of a process that dies, however it does.

    Raises:
        KitError: another build is at work, or what was left leads out of the kit.
    """
    import fcntl

    names = places(engines)
    check_places(kit, [f"{folder}/{name}" for folder in (_BUILDING, _BUILT) for name in names])
    descriptor = os.open(kit, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise KitError(f"{kit}: another build is at work in it: wait until it has ended") from error
        if (kit / _BUILT).is_dir():
            _finish(kit, names)
        for left in (_BUILDING, _BUILT):
            _remove(kit / left)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def replaced(kit: Path, engines: Iterable[str]) -> Generator[Path]:
    """A folder for engines of a kit that is claimed; they take the places of those before when the block ends well.

    Wherever that is cut short, the engines are those before, or the new ones once the next build has begun.
    """
    scratch = kit / _BUILDING
    scratch.mkdir()
    try:
        yield scratch
        (scratch / _OLD).touch()
        for path in [*scratch.rglob("*"), scratch]:
            _sync(path)
        scratch.rename(kit / _BUILT)
        _sync(kit)
        _finish(kit, places(engines))
    finally:
        _remove(scratch)


def _finish(kit: Path, names: list[str]) -> None:
    built = kit / _BUILT
    if (built / _OLD).exists():
        for name in names:
            _remove(kit / name)
        _sync_parents(kit, names)
        (built / _OLD).unlink()
        _sync(built)
    for name in names:
        if os.path.lexists(built / name):
            (kit / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(built / name, kit / name)
    _sync_parents(kit, names)
    _remove(built)
    _sync(kit)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        # A pipe, too, which nobody may wait for.
        path.unlink(missing_ok=True)


def _sync_parents(kit: Path, names: list[str]) -> None:
    """Put on the disk which files there are."""
    parents = {parent for name in names for parent in Path(name).parents}
    for folder in sorted((kit / parent for parent in parents), reverse=True):
        if folder.is_dir():
            _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
