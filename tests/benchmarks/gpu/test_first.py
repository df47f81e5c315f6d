"""The first checks on a GPU, over stand-ins for the driver and the sanitizer."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.gpu.conftest import FOLDER
from tests.fake_driver import FakeDriver

FIRST_OVER_A_STAND_IN = """
import ctypes, json, sys
from pathlib import Path
from tests.kernels.plugins.execute_launches import BENCHMARK, _Gpu

sys.path.insert(0, str(BENCHMARK))
gpu = _Gpu(ctypes.CDLL("libcuda.so.1"))
import first
from cases import rows

given = first.cases(Path(sys.argv[1]), first.SMALL, {}, ("ptx",), rounds=0)
for row in rows(case for case in given if "graph" not in case[0]):
    print(json.dumps(row))
"""


@pytest.mark.slow
def test_the_first_checks_by_value(tmp_path: Path) -> None:
    """Over a driver that runs PTX, and captures no graphs; the plugin's where there are TensorRT's headers."""
    source = Path(__file__).parents[2] / "kernels" / "plugins" / "executing_driver.c"
    flags = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
    subprocess.run(["gcc", *flags, source, "-o", tmp_path / "libcuda.so.1"], check=True)  # noqa: S607
    run = subprocess.run(
        [sys.executable, "-c", FIRST_OVER_A_STAND_IN, tmp_path],
        cwd=FOLDER.parents[1],
        env=os.environ | {"LD_LIBRARY_PATH": str(tmp_path), "SM": "87"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert not [row for row in rows if "error" in row]
    done = [row["case"] for row in rows if "result" in row]
    # TopKKeep has one type.
    assert sum(case.endswith(": ptx") for case in done) == 7
    assert done[0] == "this GPU" and done[-1] == "another thread"
    if os.environ.get("TENSORRT_INCLUDE"):
        assert sum(case.endswith(": C++ plugin") for case in done) == 7
    else:
        assert [row["case"] for row in rows if "skipped" in row] == ["C++ plugin"]


def test_a_step_beside_its_engine(
    module: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, driver: FakeDriver
) -> None:
    """Every call is one that the driver takes, pinned memory in graphs included."""
    first = module("first")
    monkeypatch.setattr(first, "_VOCABULARY", 8)
    with pytest.raises(AssertionError, match="the logits are others"):
        # The stand-in computes nothing.
        first._step(first.Stream(), 2, 3, 16, 1 << 30, len)
    assert driver.named("cuMemcpy2DAsync") and driver.graphs
    with pytest.raises(module("cases").CaseSkipped, match="no room"):
        first._step(first.Stream(), 2, 3, 16, 1000, len)


SANITIZER = """#!/bin/sh
while [ "$1" != "--log-file" ]; do tool=$2; shift; done
printf '%s\\n' "========= Invalid __global__ write of size 4 bytes" "========= ERROR SUMMARY: $ERRORS errors" > "$2"
echo '{"case": "a", "result": {}}'
[ "$ERRORS" = 0 ] || exit 86
"""


@pytest.mark.parametrize("errors", [0, 3])
def test_what_the_sanitizer_finds_fails(
    module: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, errors: int
) -> None:
    sanitizer, cases = module("sanitizer"), module("cases")
    program = tmp_path / "compute-sanitizer"
    program.write_text(SANITIZER, encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("ERRORS", str(errors))
    rows = [*cases.rows(sanitizer.cases(tmp_path))]
    assert [row["case"] for row in rows] == [f"sanitizer: {tool}" for tool in sanitizer.TOOLS]
    for row in rows:
        if errors:
            assert row["error"] == "AssertionError: 3 errors: Invalid __global__ write of size 4 bytes"
        else:
            assert row["result"] == {"errors": 0, "checks": 1}
