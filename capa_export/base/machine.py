"""Wall time and peak memory of a piece of work."""

import ctypes
import os
import platform
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

__all__ = ["Cost", "available_memory", "freed_at_once", "measured", "processor"]


_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
"""Parameters of glibc's `mallopt`."""


@dataclass
class Cost:
    """Time and memory that a block of code took; complete when the block has ended."""

    seconds: float = 0.0
    peak_memory_bytes: int = 0
    """Largest resident set of a process during the block, this one or a child; 0 where the system does not tell."""

    def as_dict(self) -> dict[str, float | int]:
        """The cost as the manifest records it."""
        return {"seconds": round(self.seconds, 3), "peak_memory_bytes": self.peak_memory_bytes}


@contextmanager
def measured() -> Generator[Cost]:
    """Measure the block; on Linux the peak is the block's own, since the kernel's mark is reset at its start."""
    cost = Cost()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    children = _peak_of_children()
    started = time.perf_counter()
    try:
        yield cost
    finally:
        cost.seconds = time.perf_counter() - started
        cost.peak_memory_bytes = max(_peak_memory(), _peak_of_children() if _peak_of_children() > children else 0)


def available_memory(root: Path = Path("/")) -> int:
    """Bytes of memory that are free on the machine, or in the control group where that has less.

    Where the system does not tell how much is free, all of it counts.

    Args:
        root: root of the file system that holds `/proc` and `/sys`.
    """
    left = [_free_on_windows() if sys.platform == "win32" else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with suppress(OSError):
        left.append(_entries(root / "proc/meminfo")["MemAvailable"] * 1024)
    for group, limit, used in _control_groups(root):
        # ValueError: the limit is "max", which is none.
        with suppress(OSError, ValueError):
            cached = _entries(group / "memory.stat")
            reclaimable = cached["active_file"] + cached["inactive_file"]
            left.append(int((group / limit).read_text()) - int((group / used).read_text()) + reclaimable)
    return max(min(left), 0)


@contextmanager
def freed_at_once() -> Generator[None]:
    """Have glibc give memory back as the block frees it, in pieces of 1 MiB or more; others do so of their own accord.

    Once something large was freed, glibc keeps freed pieces of up to 32 MiB for whoever asks next, and what is held in
    between keeps them from the system for good. Behind the block it does so again.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        yield
        return
    mallopt(_MMAP_THRESHOLD, 1 << 20)
    try:
        yield
    finally:
        mallopt(_MMAP_THRESHOLD, 32 << 20)
        mallopt(_TRIM_THRESHOLD, 64 << 20)


def _control_groups(root: Path) -> Iterator[tuple[Path, str, str]]:
    """Folders of this process's memory groups, innermost first, with the names of the files of limit and usage."""
    own: dict[str, str] = {}
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text(encoding="ascii").splitlines():
            _, controllers, path = line.split(":", 2)
            own |= dict.fromkeys(controllers.split(","), path)
    for controller, top, limit, used in (
        ("", root / "sys/fs/cgroup", "memory.max", "memory.current"),
        ("memory", root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        path = PurePosixPath(own.get(controller, "/")).relative_to("/")
        yield from ((top / part, limit, used) for part in (path, *path.parents))


def _entries(path: Path) -> dict[str, int]:
    """Read a file with a name and a number on each line."""
    lines = (line.replace(":", " ").split() for line in path.read_text(encoding="ascii").splitlines())
    return {line[0]: int(line[1]) for line in lines}


def _peak_of_children() -> int:
    """Largest resident set of any child that has ended."""
    try:
        import resource
    except ImportError:  # There is none on Windows.
        return 0
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


def _free_on_windows() -> int:
    """Bytes of memory that are free on Windows."""
    import ctypes

    class Status(ctypes.Structure):
        _fields_ = (
            ("length", ctypes.c_uint32),
            ("load", ctypes.c_uint32),
            ("total", ctypes.c_uint64),
            ("available", ctypes.c_uint64),
            ("others", ctypes.c_uint64 * 5),
        )

    status = Status(length=ctypes.sizeof(Status))
    getattr(ctypes, "windll").kernel32.GlobalMemoryStatusEx(ctypes.byref(status))  # noqa: B009 - unknown elsewhere.
    return status.available


def _peak_memory() -> int:
    with suppress(OSError, StopIteration, ValueError):
        status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024
    return 0


def processor() -> str:
    """The system's name for its processor."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
