"""The first checks once more, small, under NVIDIA's compute-sanitizer: what is written past an end, or races."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from cases import Case, skip

__all__ = ["SMALL_PART", "TOOLS", "cases"]

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
SMALL_PART = "first, small"
"""The part that is run under it."""
_FOUND = 86
"""Exit code of the sanitizer where it finds something."""
_TOOLKIT = "/usr/local/cuda/bin"


def cases(work: Path) -> Iterator[Case]:
    """A case for each of the sanitizer's tools."""
    path = os.pathsep.join([os.environ.get("PATH", ""), _TOOLKIT])
    if (program := shutil.which("compute-sanitizer", path=path)) is None:
        yield "sanitizer", partial(skip, "compute-sanitizer is not installed; it comes with the CUDA toolkit")
        return
    for tool in TOOLS:
        yield f"sanitizer: {tool}", partial(_run, program, tool, work)


def _run(program: str, tool: str, work: Path) -> dict[str, Any]:
    log = work / f"{tool}.log"
    options = ["--tool", tool, "--error-exitcode", str(_FOUND), "--log-file", log]
    command = [program, *options, sys.executable, Path(__file__).parent, "--part", SMALL_PART, work]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    said = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    summary = re.search(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard", said)
    errors = int(next(filter(None, summary.groups()))) if summary else 0
    if errors or run.returncode == _FOUND:
        lines = [line.strip("= ") for line in said.splitlines()]
        first = next((line for line in lines if line and not re.search("COMPUTE-SANITIZER|SUMMARY", line)), "no log")
        raise AssertionError(f"{errors} errors: {first}")
    assert run.returncode == 0, f"exit code {run.returncode}; {said[-200:]}"
    rows = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    if wrong := [row for row in rows if "error" in row]:
        raise AssertionError(f"{wrong[0]['case']}: {wrong[0]['error']}")
    return {"errors": errors, "checks": sum("result" in row for row in rows)}
