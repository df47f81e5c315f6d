"""Everything that needs a GPU, in under nine minutes and without a network: one table, and JSON.

With --first, what is most telling on a GPU that nothing has run on yet, in three and a half minutes: kernels from
cubins and PTX by value, the C++ plugin's enqueue, kernels in CUDA graphs, what a step of decode costs beside its
engine; then the same, small, under compute-sanitizer.

Install (carry the wheels): a torch with CUDA, `capa-export[rtx]` (triton, cuda-bindings, tensorrt-rtx), and a C
compiler for triton; `tensorrt` where TensorRT-RTX does not take the GPU, TENSORRT_INCLUDE=DIR for native plugins.
What a machine lacks is skipped, and the table says what.
Run: python benchmarks/gpu [--first] --out FILE.json. Exit code 1: something failed, the table says what; 3: there is
no GPU.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

_HERE = Path(__file__).parent
sys.path[:0] = [str(_HERE), str(_HERE.parents[1]), str(_HERE.parent / "peer")]

# Found by the line above only.
from cases import Case, installed, rows  # noqa: E402
from processes import measured_run  # noqa: E402  # pyright: ignore[reportMissingImports]

_PACKAGES = ("torch", "triton", "cuda-bindings", "transformers", "onnxruntime", "tensorrt-rtx", "tensorrt")
_DEVICE = """
import json, torch
found = {"torch": torch.__version__, "name": None}
if torch.cuda.is_available():
    facts = torch.cuda.get_device_properties(0)
    found |= {"name": facts.name, "memory_GB": facts.total_memory / 1e9}
    found |= {"compute_capability": f"{facts.major}.{facts.minor}"}
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Part:
    """A part of the benchmark, which runs in a process of its own."""

    seconds: float
    """The part's share of the time; what it leaves goes to those after it."""
    cases: Callable[[Path], Iterator[Case]]


def _engines(runtime: str, variants: str) -> Callable[[Path], Iterator[Case]]:
    def cases(work: Path) -> Iterator[Case]:
        module = import_module("engines")
        return module.cases(work, runtime, getattr(module, variants))

    return cases


PARTS: Mapping[str, Part] = {
    "kernels": Part(150, lambda work: import_module("kernels").cases(work)),
    "peers": Part(130, lambda work: import_module("peers").cases(work)),
    "tensorrt-rtx": Part(150, _engines("tensorrt-rtx", "VARIANTS")),
    "tensorrt-rtx native": Part(30, _engines("tensorrt-rtx", "NATIVE_VARIANTS")),
    "tensorrt": Part(40, _engines("tensorrt", "VARIANTS")),
    "tensorrt native": Part(20, _engines("tensorrt", "NATIVE_VARIANTS")),
}
"""Parts by name, in order: what is skipped early leaves its time to the last."""


def _small(work: Path) -> Iterator[Case]:
    first = import_module("first")
    return first.cases(work, first.SMALL, {"small": (2, 2, 16)}, rounds=0)


FIRST: Mapping[str, Part] = {
    "first": Part(120, lambda work: import_module("first").cases(work)),
    "sanitizer": Part(90, lambda work: import_module("sanitizer").cases(work)),
}
"""Parts of --first."""
_UNDER_SANITIZER = {"first, small": Part(0, _small)}
"""Started by the sanitizer's part."""


def run_part(name: str, work: Path, seconds: float) -> dict[str, Any]:
    """Rows of a part, as far as it came, and why it came no further."""
    if seconds <= 0:
        return {"seconds": 0.0, "rows": [], "error": "no time was left for it"}
    command = [sys.executable, str(_HERE), "--part", name, str(work)]
    outcome = measured_run(command, work / f"{name}.log", seconds)
    found = [json.loads(line) for line in outcome["stdout"].splitlines(keepends=True) if line.endswith("\n")]
    return {"seconds": outcome["seconds"], "rows": found, "error": outcome["error"]}


def print_rows(name: str, work: Path) -> None:
    """Run a part in its process; prints a line of JSON for each row, as soon as it is known."""
    # Libraries talk, and stdout is for rows.
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        part = {**PARTS, **FIRST, **_UNDER_SANITIZER}[name]
        for row in rows(installed(name, part.cases, work)):
            print(json.dumps(row), file=out, flush=True)


def table(parts: Mapping[str, Mapping[str, Any]]) -> str:
    """A table with a line for each row: milliseconds, and what else there is to say."""
    lines = [("case", "ms", "")]
    for name, part in parts.items():
        for row in part["rows"]:
            figures = dict(row.get("result", {}))
            ms = figures.pop("ms", None)
            said = [f"{key}: {row[key]}" for key in ("skipped", "error") if key in row]
            said += [f"{key} {_number(value)}" for key, value in figures.items()]
            lines.append((row["case"], "" if ms is None else _number(ms), ", ".join(said)))
        if part["error"]:
            lines.append((name, "", f"error: {part['error']}"))
    widths = [max(len(line[column]) for line in lines) for column in range(2)]
    return "\n".join(f"{case:<{widths[0]}}  {ms:>{widths[1]}}  {rest}".rstrip() for case, ms, rest in lines)


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def failed(parts: Mapping[str, Mapping[str, Any]]) -> bool:
    return any(part["error"] or any("error" in row for row in part["rows"]) for part in parts.values())


def dry_run() -> None:
    """Print the cases that would be run, and the least time of each kernel on chips whose data sheet is known."""
    from problem import problems
    from timing import CHIPS

    for option, parts in ("", PARTS), (" of --first", FIRST):
        print(f"parts{option}: " + ", ".join(f"{name} ({part.seconds:g} s)" for name, part in parts.items()))
    print("\nfloor of the kernels, microseconds: " + ", ".join(CHIPS))
    for problem in problems():
        cost = problem.operator.cost(problem.size)
        floors = "  ".join(f"{1e3 * chip.floor_ms(cost):>9.3g}" for chip in CHIPS.values())
        print(f"{problem.name:<48}{floors}")


def _about(device: Mapping[str, Any], command: Sequence[str]) -> dict[str, Any]:
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "device": {**device, "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")},
        "machine": platform.machine(),
        "versions": {"python": platform.python_version(), **{package: _version(package) for package in _PACKAGES}},
        "command": " ".join(command),
        "commit": _said("git", "-C", str(_HERE), "rev-parse", "HEAD"),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _said(*command: str) -> str | None:
    """The first line that a program prints; None where there is no such program, or it fails."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return next(iter(run.stdout.splitlines()), None)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        "python benchmarks/gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="the JSON; written anew after every part")
    what.add_argument("--dry-run", action="store_true", help="list parts, sizes and floors; needs no GPU")
    what.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--first", action="store_true", help="the first checks on a new GPU, in place of all")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="some of the parts")
    options = parser.parse_args(arguments)
    if options.first and options.only != list(PARTS):
        parser.error("--only names some of the parts without --first")
    if options.dry_run:
        dry_run()
        return 0
    if options.part:
        print_rows(options.part[0], Path(options.part[1]))
        return 0
    device = json.loads(_said(sys.executable, "-c", _DEVICE) or "null")
    if device is None or device["name"] is None:
        reason = f"torch {device['torch']} finds none" if device else "torch cannot be imported"
        print(f"no GPU: {reason}; --dry-run shows what would be run", file=sys.stderr)
        return 3
    about = _about(device, ["python", "benchmarks/gpu", *arguments])
    parts: dict[str, Any] = {}
    chosen = FIRST if options.first else PARTS
    names = list(FIRST) if options.first else options.only
    left = sum(part.seconds for part in chosen.values())
    with TemporaryDirectory() as work:
        for index, name in enumerate(names):
            started = time.perf_counter()
            seconds = left - sum(chosen[later].seconds for later in names[index + 1 :])
            parts[name] = run_part(name, Path(work), seconds)
            left -= time.perf_counter() - started
            print(f"{name}: {parts[name]['seconds']:.0f} of {seconds:.0f} s", file=sys.stderr)
            options.out.write_text(json.dumps({**about, "parts": parts}, indent=1) + "\n", encoding="utf-8")
    print(table(parts))
    return int(failed(parts))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
