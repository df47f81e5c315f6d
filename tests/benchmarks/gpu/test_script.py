"""What becomes of parts that fail, hang or lack something, and of machines without a GPU."""

import importlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.benchmarks.gpu.conftest import FOLDER, OPERATORS


@pytest.fixture
def script(module: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """`__main__.py`, not run."""
    spec = importlib.util.spec_from_file_location("gpu_benchmark", FOLDER / "__main__.py")
    assert spec is not None and spec.loader is not None
    main = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_benchmark", main)
    spec.loader.exec_module(main)
    return main


def test_a_failure_is_a_row_and_the_next_case_is_run(module: Callable[[str], Any]) -> None:
    cases = module("cases")

    def fails() -> dict[str, Any]:
        raise ValueError("two\nlines")

    given = [("a", fails), ("b", partial(cases.skip, "no such thing")), ("c", lambda: {"ms": 1.5})]
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in cases.rows(given)]
    assert rows == [
        {"case": "a", "error": "ValueError: two lines"},
        {"case": "b", "skipped": "no such thing"},
        {"case": "c", "result": {"ms": 1.5}},
    ]


PARTS = """
import os, time

def fine(work):
    # As libraries do, in Python and below it.
    print("not a row")
    os.system("echo nor this")
    yield "first", lambda: {"ms": 2.0, "other": 3.0}
    yield "second", lambda: 1 / 0

def dies(work):
    yield "first", lambda: {"ms": 1.0}
    yield "second", lambda: os.abort()

def hangs(work):
    yield "first", lambda: {"ms": 1.0}
    yield "second", lambda: time.sleep(600)

def raises(work):
    raise RuntimeError("no room")
    yield
"""


@pytest.fixture
def whole(script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The script, pretending to a GPU, with parts that need none."""
    (tmp_path / "standins.py").write_text(PARTS, encoding="utf-8")
    launcher = tmp_path / "launcher.py"
    launcher.write_text(
        f"import sys; sys.path[:0] = [{str(FOLDER)!r}, {str(tmp_path)!r}]\n"
        "import runpy, standins\n"
        f"main = runpy.run_path({str(FOLDER / '__main__.py')!r}, run_name='main')\n"
        "name, work = sys.argv[2:]\n"
        "main['PARTS'][name] = main['Part'](1, getattr(standins, name))\n"
        "main['print_rows'](name, work)\n",
        encoding="utf-8",
    )
    limits = {"hangs": 10, "fine": 60, "dies": 60, "raises": 60}
    monkeypatch.setattr(script, "PARTS", {name: script.Part(seconds, None) for name, seconds in limits.items()})
    monkeypatch.setattr(script, "_HERE", launcher)
    said = script._said

    def with_gpu(*command: str) -> str | None:
        return DEVICE if command[0] == sys.executable else said(*command)

    monkeypatch.setattr(script, "_said", with_gpu)
    return script


DEVICE = json.dumps({"torch": "2.13", "name": "a GPU", "memory_GB": 8.0, "compute_capability": "8.9"})


@pytest.mark.slow
def test_parts_that_die_hang_or_raise_leave_the_others_alone(
    whole: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    assert whole.main(["--out", str(out), "--only", "hangs", "fine", "dies", "raises"]) == 1
    report = json.loads(out.read_text(encoding="utf-8"))
    assert set(report) == {"date", "device", "machine", "versions", "command", "commit", "parts"}
    assert {"name", "compute_capability", "driver", "memory_GB", "torch"} == set(report["device"])
    assert report["versions"]["onnxruntime"] and report["versions"]["tensorrt"]
    assert report["command"].startswith("python benchmarks/gpu --out")
    parts = report["parts"]
    assert [row["case"] for row in parts["fine"]["rows"]] == ["first", "second"]
    assert parts["fine"]["error"] is None
    assert parts["fine"]["rows"][1]["error"] == "ZeroDivisionError: division by zero"
    for name, error in {"dies": "SIGABRT", "raises": "RuntimeError: no room", "hangs": "not finished"}.items():
        assert error in parts[name]["error"]
        assert [row["case"] for row in parts[name]["rows"]] == ([] if name == "raises" else ["first"])
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["case", "ms"]
    assert ["first", "2", "other", "3"] in [line.split() for line in table]
    assert sum("error: " in line for line in table) == 4


def test_what_is_skipped_is_no_failure(script: Any) -> None:
    parts = {"a": {"rows": [{"case": "x", "skipped": "not installed"}], "error": None}}
    assert not script.failed(parts)
    assert "skipped: not installed" in script.table(parts)
    assert script.failed(parts | {"b": {"rows": [], "error": "died"}})


def test_all_of_it_takes_less_than_nine_minutes(script: Any) -> None:
    assert sum(part.seconds for part in script.PARTS.values()) <= 9 * 60 - 20
    assert script.FIRST["first"].seconds == 120
    assert sum(part.seconds for part in script.FIRST.values()) <= 4 * 60


@pytest.mark.slow
@pytest.mark.parametrize("lacks", ["pydantic", "triton"])
def test_what_is_not_installed_is_skipped(lacks: str, tmp_path: Path) -> None:
    """In a process that has not imported it yet; whatever is missing, no part ends as an error."""
    code = f"""
import sys
sys.modules[{lacks!r}] = None
sys.argv = [{str(FOLDER)!r}]
import runpy
main = runpy.run_path({str(FOLDER)!r})
for name, part in {{**main["PARTS"], **main["FIRST"]}}.items():
    # Of the workload a GPU with torch is needed.
    if name not in ("kernels", "peers") or {lacks!r} == "pydantic" and name == "peers":
        for row in main["rows"](main["installed"](name, part.cases, main["Path"]({str(tmp_path)!r}))):
            print(main["json"].dumps([name, row]))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert not [row for row in rows if "error" in row[1]]
    said = {name: row["skipped"] for name, row in rows if "skipped" in row}
    assert said.keys() >= {"first", "sanitizer", "tensorrt-rtx", "tensorrt", "tensorrt native"}, rows
    if lacks == "pydantic":
        assert {said[name] for name in ("peers", "tensorrt-rtx", "tensorrt")} == {"pydantic is not installed"}


def test_a_module_of_ours_that_is_missing_is_an_error(module: Callable[[str], Any], tmp_path: Path) -> None:
    cases = module("cases")

    def part(_: Path) -> Any:
        importlib.import_module("capa_export.no_such_module")
        yield from ()

    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        list(cases.rows(cases.installed("a", part, tmp_path)))


def test_without_a_gpu_it_says_so(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not torch.cuda.is_available(), "this test is for machines without a GPU"
    assert script.main(["--out", str(tmp_path / "out.json")]) == 3
    assert capsys.readouterr().err.splitlines() == [
        f"no GPU: torch {torch.__version__} finds none; --dry-run shows what would be run"
    ]
    assert not (tmp_path / "out.json").exists()


def test_a_dry_run_lists_parts_sizes_and_floors(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--dry-run"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in (*script.PARTS, *OPERATORS, "Qwen2.5-VL-7B, 16k", "H200", "RTX 4090"))
    [line] = [line for line in text.splitlines() if line.startswith("VisualScale, LLaVA-1.5-7B, fp16")]
    # x without text, text, scale, rows and y at 3.35 TB/s.
    num_bytes = 2 * 4096 * (576 + 48 + 624 + 1) + 8 * 48
    assert f"{num_bytes / 3.35e12 * 1e6:.3g}" in line.split()
