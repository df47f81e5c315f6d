"""Messages while work goes on, and progress with an estimate of the time left; commands show both on stderr.

As a library, nothing is printed: messages go to the logger `capa_export`, and progress to the caller's `Report`.
"""

import logging
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import TypeVar

from capa_export.base.errors import harmless

__all__ = ["Report", "progress", "say", "silent", "talk", "talks", "ticking", "tracked"]

Report = Callable[[str, int, int], None]
"""Called with the name of the work, the amount that is done, and the whole amount."""

T = TypeVar("T")

_LOG_SECONDS = 10.0


_LOGGER = logging.getLogger("capa_export")


class _OnStderr(logging.Handler):
    """Writes to the `sys.stderr` of the moment, which a progress bar replaces."""

    def emit(self, record: logging.LogRecord) -> None:
        print(harmless(self.format(record)), file=sys.stderr, flush=True)


def talk() -> None:
    """Show messages on stderr from now on, since stdout is data; for commands."""
    if not talks():
        _LOGGER.addHandler(_OnStderr())
        _LOGGER.setLevel(logging.INFO)


def talks() -> bool:
    """Whether messages are shown on stderr."""
    return any(isinstance(handler, _OnStderr) for handler in _LOGGER.handlers)


def say(line: str) -> None:
    """Send a message to the person who waits."""
    _LOGGER.info("%s", line)


def silent(_what: str, _done: int, _total: int) -> None:
    """Report nothing."""


def tracked(items: Iterable[T], what: str, total: int, report: Report) -> Iterator[T]:
    """Yield the items, with a report before each one, and another when all are done."""
    for done, item in enumerate(items):
        report(what, done, total)
        yield item
    report(what, total, total)


@contextmanager
def progress() -> Generator[Report]:
    """Show progress on stderr until the block ends."""
    if not sys.stderr.isatty():
        yield _LogLines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(harmless(what), total=total)
            bars.update(tasks[what], completed=done, total=total, visible=done < total)

        yield report


@contextmanager
def ticking(what: str) -> Generator[None]:
    """Show on stderr that one long step is still running, and for how long, until the block ends; for commands."""
    if not talks():
        yield
        return
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
            bars.add_task(harmless(what), total=None)
            yield
        return
    done, started = Event(), time.monotonic()

    def tick() -> None:
        while not done.wait(_LOG_SECONDS):
            say(f"{what}: {time.monotonic() - started:.0f} s")

    Thread(target=tick, daemon=True).start()
    try:
        yield
    finally:
        done.set()


class _LogLines:
    """A report that prints a line when a piece of work has run for a while, then every ten seconds."""

    def __init__(self) -> None:
        self.started: dict[str, float] = {}
        self.printed = time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        started = self.started.setdefault(what, now)
        if done >= total:
            del self.started[what]
        elif now - self.printed >= _LOG_SECONDS:
            self.printed = now
            elapsed = now - started
            times = f", {elapsed:.0f} s, {elapsed / done * (total - done):.0f} s left" if done else ""
            say(f"{what}: {done} of {total}{times}")
