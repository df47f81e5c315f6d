"""Peers as processes: environments, costs seen from outside, and workers that take turns."""

import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

__all__ = ["Outcome", "Worker", "environment", "first_error", "measured_run"]

_QUIET = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "HF_HUB_OFFLINE": "1",
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore",
}
_LONGEST = 220
# A process's peak starts at the resident set of the one that forked it: that has to be a small one.
_LAUNCHER = """
import json, os, sys
child = os.fork()
if not child:
    os.execv(sys.argv[2], sys.argv[2:])
_, status, usage = os.wait4(child, 0)
cost = {
    "exit": os.waitstatus_to_exitcode(status),
    "processor_seconds": round(usage.ru_utime + usage.ru_stime, 2),
    "peak_memory_bytes": usage.ru_maxrss * 1024,
}
with open(sys.argv[1], "w") as file:
    json.dump(cost, file)
"""

Outcome = dict[str, Any]
"""`error`, None if there was none, `seconds`, `processor_seconds`, `peak_memory_bytes`, and `stdout`."""


def environment(folder: Path, python: str, requirements: Sequence[str], log: Path) -> tuple[Path, str | None]:
    """The interpreter of a virtual environment with the requirements in it, made if need be, or why there is none."""
    interpreter, stamp = folder / "bin" / "python", folder / "requirements.txt"
    wanted = "\n".join(requirements)
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return interpreter, None
    shutil.rmtree(folder, ignore_errors=True)
    with log.open("w", encoding="utf-8") as out:
        for command in (
            [python, "-m", "venv", str(folder)],
            [str(interpreter), "-m", "pip", "install", "--quiet", *requirements],
        ):
            if subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, check=False).returncode:
                return interpreter, first_error(log.read_text(encoding="utf-8", errors="replace"))
    stamp.write_text(wanted, encoding="utf-8")
    return interpreter, None


def first_error(log: str) -> str:
    """The first line of the exception that ended a log, or its last line."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", log) if line.strip()]
    raised = [
        line for line in lines if re.match(r"(?:[\w.]+\.)?\w*(?:Error|Exception|Interrupt|Exit)(?::|$)|ERROR:", line)
    ]
    line = (raised or lines or ["no output"])[-1]
    line = re.sub(r"(?:/[\w.+-]+){2,}/([\w.+-]+)", r"\1", line)
    return line if len(line) <= _LONGEST else line[:_LONGEST].rsplit(" ", 1)[0] + " ..."


def measured_run(command: Sequence[str], log: Path, timeout: float) -> Outcome:
    """Run to the end or to the limit; seconds and the peak resident set, seen from outside."""
    cost_file = log.with_suffix(".cost")
    cost_file.unlink(missing_ok=True)
    started = time.perf_counter()
    with log.open("wb") as errors:
        process = _start([sys.executable, "-S", "-E", "-c", _LAUNCHER, str(cost_file), *command], errors)
        assert process.stdout is not None
        stdout, chunk = b"", None
        try:
            while chunk := _read(process.stdout, started + timeout - time.perf_counter()):
                stdout += chunk
        finally:
            # Late, or interrupted: it is in a session of its own, where no Ctrl-C comes.
            if chunk != b"":
                _kill(process)
        process.wait()
    cost = {"exit": 0, "processor_seconds": None, "peak_memory_bytes": None}
    if cost_file.exists():
        cost = json.loads(cost_file.read_text(encoding="utf-8"))
    code, error = cost.pop("exit"), None
    if chunk is None:
        error = f"TimeoutError: not finished after {timeout:g} s"
    elif code < 0:
        error = f"ended by {signal.Signals(-code).name}"
    elif code:
        error = first_error(log.read_text(encoding="utf-8", errors="replace") + stdout.decode(errors="replace"))
    return {"error": error, "seconds": round(time.perf_counter() - started, 2), **cost, "stdout": stdout.decode()}


def _start(command: Sequence[str], errors: IO[bytes], threads: int = 1, **options: Any) -> subprocess.Popen[bytes]:
    environment = os.environ | _QUIET | {"OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=errors, env=environment, start_new_session=True, **options
    )


def _read(pipe: IO[bytes], seconds: float) -> bytes | None:
    """Read from a pipe; empty at its end, None after so many seconds of nothing."""
    if not select.select([pipe], [], [], max(seconds, 0))[0]:
        return None
    return os.read(pipe.fileno(), 1 << 20)


def _kill(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


class Worker:
    """An adapter's `prefill` or `ask` verb, waiting for its turns."""

    def __init__(self, command: Sequence[str], log: Path, timeout: float, threads: int = 1) -> None:
        self.log, self.timeout = log, timeout
        self._buffer = b""
        with log.open("wb") as errors:
            self.process = _start(command, errors, stdin=subprocess.PIPE, threads=threads)
        self.error: str | None = None
        """Why it does not run, or no longer."""
        self.first: dict[str, Any] = self._receive() or {}
        """Its first message: of prefills, variant -> logits [V] of the last position; of answers, what loading took."""

    def run(self, line: str) -> Any:
        """Its reply; of a prefill, seconds on the clock and of the processor. None once there is an error."""
        if self.error is not None:
            return None
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(line.encode() + b"\n")
            self.process.stdin.flush()
        return self._receive()

    def close(self) -> None:
        """End the process."""
        _kill(self.process)
        self.process.wait()

    def _receive(self) -> Any:
        """The next message; None where the process ended or says nothing, and the error says why."""
        assert self.process.stdout is not None
        end = time.perf_counter() + self.timeout
        while b"\n" not in self._buffer:
            chunk = _read(self.process.stdout, end - time.perf_counter())
            if not chunk:
                self.close()
                late = f"TimeoutError: no answer after {self.timeout:g} s"
                log = self.log.read_text(encoding="utf-8", errors="replace")
                self.error = late if chunk is None else first_error(log)
                return None
            self._buffer += chunk
        line, self._buffer = self._buffer.split(b"\n", 1)
        return json.loads(line)
