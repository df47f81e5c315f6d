"""Looks whether the processes that a command started end with it when it is killed."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

__all__ = ["SLEEPER", "await_started", "ended_with_parent", "have_ended"]

SLEEPER = """
import ctypes, os, subprocess
from pathlib import Path
for process in (os.getpid(), subprocess.Popen(["sleep", "60"]).pid):
    Path(os.environ["STARTED"], str(process)).touch()
# Python's lock is held, as libraries do.
ctypes.PyDLL(None).sleep(60)
"""
"""What a process does that says that it and one of its own were started, and goes on for long."""


def ended_with_parent(script: str, folder: Path, count: int, environment: Mapping[str, str] | None = None) -> bool:
    """Run Python that starts processes, kill it alone, and look whether all of these end by themselves.

    Args:
        script: has them make a file in the folder STARTED, called by the number of their process.
        folder: for that.
        count: how many to wait for.
        environment: more variables.
    """
    started = folder / "started"
    started.mkdir()
    variables = {**os.environ, **(environment or {}), "STARTED": str(started)}
    with subprocess.Popen([sys.executable, "-c", script], env=variables) as parent:
        try:
            await_started(parent, started, count)
        finally:
            parent.kill()
    return have_ended(started)


def await_started(parent: "subprocess.Popen[bytes]", started: Path, count: int) -> None:
    """Wait until processes have said that they were started."""
    assert _wait(lambda: len(list(started.iterdir())) == count or parent.poll() is not None, 120)
    assert parent.poll() is None


def have_ended(started: Path) -> bool:
    """Whether all processes that said that they were started end by themselves, soon."""
    children = [int(path.name) for path in started.iterdir()]
    return _wait(lambda: not any(map(_is_running, children)), 10)


def _wait(done: Callable[[], bool], seconds: float) -> bool:
    """Whether something becomes so in time."""
    end = time.monotonic() + seconds
    while not done() and time.monotonic() < end:
        time.sleep(0.05)
    return done()


def _is_running(process: int) -> bool:
    """Whether it is there and no mere entry that nobody has asked for."""
    try:
        status = Path(f"/proc/{process}/stat").read_text(encoding="utf-8")
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"
