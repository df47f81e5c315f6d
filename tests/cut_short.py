"""Cuts work on files short: kills it before any of its changes, or takes what a disk holds when the power fails."""

import gc
import os
import pickle
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import RLock
from typing import Any

__all__ = ["DiskState", "Recording", "killed_at", "recorded"]

_CHANGES = {
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "os.utime",
}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_KILLED = 9

Work = Callable[[], object]


def killed_at(work: Work, point: int) -> bool:
    """Do work in a fork that ends, as if killed, before its change of the file system number `point`, counted from 0.

    Returns:
        Whether it was killed; else it came to its end.
    """
    changes = 0

    def before(_: object) -> None:
        nonlocal changes
        if changes == point:
            os._exit(_KILLED)
        changes += 1

    code = _in_fork(lambda: (_before_changes(before), work()))
    assert code in (0, _KILLED), f"the work failed with {code}"
    return code == _KILLED


@dataclass(frozen=True)
class DiskState:
    """What a disk holds of a folder."""

    files: tuple[tuple[str, bytes, int], ...]
    """Name, content and time of every file."""
    folders: tuple[str, ...]

    def write(self, folder: Path) -> None:
        """Put it into a folder that does not exist yet."""
        folder.mkdir()
        for name in self.folders:
            (folder / name).mkdir()
        for name, content, time in self.files:
            (folder / name).write_bytes(content)
            os.utime(folder / name, ns=(time, time))

    def is_all_of(self, folder: Path) -> bool:
        """Whether a folder holds this and nothing else."""
        names = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
        return names == {*self.folders, *(name for name, _, _ in self.files)} and all(
            (folder / name).stat().st_mtime_ns == time and (folder / name).read_bytes() == content
            for name, content, time in self.files
        )


@dataclass(frozen=True)
class Recording:
    """What may be left of a folder where work on it is cut short.

    Without power, two kinds of file systems are taken. One loses every name that was not synced with its folder. The
    other keeps the order of names, and may have any number of the latest; that is what journals do. Both lose the
    content of files that were not synced.
    """

    killed: list[DiskState]
    """Before each change, and at the end."""
    without_power: set[DiskState]
    """At any time."""
    afterwards: DiskState
    """Without power at the end, where the least is kept."""


def recorded(work: Work, folder: Path, file: Path) -> Recording:
    """Do work in a fork, and note every change of the file system.

    Args:
        work: what is done.
        folder: what is looked at; it exists.
        file: takes the answer on its way, anywhere else.
    """

    def record() -> None:
        disk = _Disk(folder)
        _before_changes(disk.note)
        work()
        disk.note(None)
        killed = [disk.state(step.entries, step.contents) for step in disk.steps]
        states = list(disk.states_without_power())
        file.write_bytes(pickle.dumps(Recording(killed, set(states), states[-1])))

    code = _in_fork(record)
    assert code == 0, f"the work failed with {code}"
    return pickle.loads(file.read_bytes())  # noqa: S301 - the fork's own.


def _in_fork(work: Work) -> int:
    """The exit code of a fork that does the work."""
    with warnings.catch_warnings():
        # Other threads hold no lock that the work needs.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        # What earlier tests left has threads that are not in the fork, and cannot be taken down here.
        gc.disable()
        try:
            work()
        except BaseException:  # noqa: BLE001 - a fork of the tests must not go on with them.
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _before_changes(call: Callable[[Any], object]) -> None:
    """Call a function before every change of the file system by this process; with the descriptor if it is a sync."""
    lock, inside = RLock(), False

    def once(synced: int | None) -> None:
        nonlocal inside
        with lock:
            if not inside:
                inside = True
                call(synced)
                inside = False

    def audit(event: str, given: tuple[Any, ...]) -> None:
        if event in _CHANGES or (event == "open" and (given[2] or 0) & _WRITING):
            once(None)

    sys.addaudithook(audit)
    # The disk is simulated, and the test need not wait for the real one.
    os.fsync = once


@dataclass
class _Step:
    """The folder before a change."""

    entries: dict[int, dict[str, int]]
    """Folder -> name -> inode."""
    contents: dict[int, tuple[bytes, int]]
    """File -> content and time."""
    synced: int | None
    """The file or folder that the change puts on the disk, if it does."""


@dataclass
class _Disk:
    """Every step that a folder goes through."""

    folder: Path
    steps: list[_Step] = field(default_factory=list)
    _folders: set[int] = field(default_factory=set)
    _held: dict[int, int] = field(default_factory=dict)
    """Inode -> a descriptor, so that no other file gets its number."""
    _read: dict[tuple[int, int, int], tuple[bytes, int]] = field(default_factory=dict)
    """Files by inode, size and time, each held in memory once."""

    def note(self, synced: int | None) -> None:
        """Note the folder as it is, before a change."""
        step = _Step({}, {}, None if synced is None else os.fstat(synced).st_ino)
        self._walk(self.folder, step)
        self.steps.append(step)

    def _walk(self, folder: Path, step: _Step) -> None:
        entries = step.entries[self._hold(folder)] = {}
        self._folders.add(folder.stat().st_ino)
        for path in folder.iterdir():
            inode = entries[path.name] = self._hold(path)
            if path.is_dir():
                self._walk(path, step)
            else:
                status = path.stat()
                key = inode, status.st_size, status.st_mtime_ns
                if key not in self._read:
                    self._read[key] = path.read_bytes(), status.st_mtime_ns
                step.contents[inode] = self._read[key]

    def _hold(self, path: Path) -> int:
        inode = path.stat().st_ino
        if inode not in self._held:
            self._held[inode] = os.open(path, os.O_RDONLY)
        return inode

    def states_without_power(self) -> Iterator[DiskState]:
        """Every state that the disk may be left in, as time goes by; the last is that in which the least is kept."""
        entries, contents, first = dict(self.steps[0].entries), dict(self.steps[0].contents), 0
        for number, step in enumerate(self.steps):
            for earlier in self.steps[first : number + 1]:
                yield self.state(earlier.entries, contents)
            yield self.state(entries, contents)
            if step.synced in step.entries:
                entries[step.synced], first = step.entries[step.synced], number
            elif step.synced in step.contents:
                contents[step.synced] = step.contents[step.synced]

    def state(self, entries: dict[int, dict[str, int]], contents: dict[int, tuple[bytes, int]]) -> DiskState:
        """What is found from the folder on; a file without content is empty."""
        files: list[tuple[str, bytes, int]] = []
        folders: list[str] = []

        def walk(inode: int, prefix: str) -> None:
            for name, below in sorted(entries.get(inode, {}).items()):
                if below in self._folders:
                    folders.append(prefix + name)
                    walk(below, f"{prefix}{name}/")
                else:
                    files.append((prefix + name, *contents.get(below, (b"", 0))))

        walk(self.folder.stat().st_ino, "")
        return DiskState(tuple(files), tuple(folders))
