"""Wall time and peak memory of a piece of work."""

import resource
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Cost", "measured"]


@dataclass
class Cost:
    """What a block of code took; complete when the block has ended."""

    seconds: float = 0.0
    peak_memory_bytes: int = 0
    """Largest resident set of a process during the block, this one or a child; 0 where the system does not tell."""

    def as_dict(self) -> dict[str, float | int]:
        """For the manifest."""
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


def _peak_of_children() -> int:
    """Largest resident set of any child that has ended."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


def _peak_memory() -> int:
    with suppress(OSError, StopIteration, ValueError):
        status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024
    return 0
