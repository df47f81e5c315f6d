"""The benchmark for GPUs, as far as it runs without one: what it computes, and what becomes of failures."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from capa_export.base.errors import CapaError
from capa_export.kernels.execute import execute
from capa_export.parity.trace import Trace
from tests.fake_driver import FakeDriver
from tests.graph.one_node import run
from tests.models.qwen25vl import random_model, save_model

FOLDER = Path(__file__).parents[2] / "benchmarks" / "gpu"
OPERATORS = ("ContributionScore", "TopKKeep", "TokenGather", "VisualScale")
SMALL = {"small": {"hidden_size": 48, "heads": 4, "kv_heads": 2, "tokens": 150, "kept": 70, "head_size": 32}}


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Imports one of the benchmark's files."""
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    return importlib.import_module


@pytest.fixture
def script(module: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """`__main__.py`, not run."""
    spec = importlib.util.spec_from_file_location("gpu_benchmark", FOLDER / "__main__.py")
    assert spec is not None and spec.loader is not None
    main = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_benchmark", main)
    spec.loader.exec_module(main)
    return main


def problem(module: Callable[[str], Any], operator: str, half: str = "fp16") -> Any:
    problems = module("problem").problems("cpu", SMALL)
    return next(one for one in problems if one.operator.name == operator and half in (one.half, operator))


def test_the_problems_are_those_of_true_models(module: Callable[[str], Any]) -> None:
    problems = list(module("problem").problems())
    assert len({one.name for one in problems}) == len(problems) == 3 * (2 * 3 + 1)
    for one in problems:
        assert (one.size.num_text, one.size.head_size, one.size.projection) == (48, 128, one.size.heads * 128)
        # A quarter of the visual tokens, and all of text.
        assert one.size.kept == (one.size.tokens - 48) // 4 + 48


# Not bf16, which Triton's interpreter gets wrong.
@pytest.mark.parametrize("operator", OPERATORS)
def test_kernels_meet_the_check(module: Callable[[str], Any], operator: str) -> None:
    one = problem(module, operator)
    outputs = execute(one.operator, one.inputs, **one.attributes)
    one.check(tuple(outputs.values()))
    damaged = [output.clone() for output in outputs.values()]
    damaged[-1] = damaged[-1].flip(1)
    with pytest.raises(AssertionError, match=list(outputs)[-1]):
        one.check(tuple(damaged))


@pytest.mark.parametrize("half", ["fp16", "bf16"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_bodies_meet_the_check(module: Callable[[str], Any], operator: str, half: str) -> None:
    one = problem(module, operator, half if operator != "TopKKeep" else "fp16")
    one.check(module("kernels").body_of(one, compiled=False)())


@pytest.mark.parametrize("operator", OPERATORS)
def test_bodies_are_those_of_the_onnx_functions(module: Callable[[str], Any], operator: str) -> None:
    one = problem(module, operator)
    own = module("kernels").body_of(one, compiled=False)()
    feed = [one.graph_inputs[name] for name in one.operator.inputs]
    arrays = [np.array([x]) if isinstance(x, int) else x.numpy() for x in feed]
    found = run(operator, arrays, **one.attributes)
    rtol = 4e-6 if operator == "ContributionScore" else 0
    for mine, body in zip(
        own if isinstance(own, tuple) else (own,), found if isinstance(own, tuple) else (found,), strict=True
    ):
        np.testing.assert_allclose(mine.numpy(), body, rtol=rtol, atol=0)


def test_bodies_compile_as_one_graph(module: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    for operator in OPERATORS:
        one = problem(module, operator)
        one.check(module("kernels").body_of(one, compiled=True)())


def test_a_time_is_taken_with_and_without_a_graph(module: Callable[[str], Any]) -> None:
    launched: list[str] = []

    def timer(work: Callable[[], None], *, busy: bool) -> float:
        work()
        return float(busy)

    def graph(work: Callable[[], None]) -> Callable[[], None]:
        return lambda: launched.append("graph")

    times = module("timing").timed(lambda: launched.append("kernels"), timer, graph)
    assert times == {"ms": 0, "graph_ms": 1}
    assert launched == ["kernels", "graph"]


def test_the_floor_is_what_bounds_first(module: Callable[[str], Any]) -> None:
    chip = module("timing").Chip(bytes_per_second=1e9, flops_per_second=1e12)
    cost = importlib.import_module("capa_export.kernels.operator").Cost
    assert chip.floor_ms(cost(bytes=2_000_000, flops=0)) == pytest.approx(2)
    assert chip.floor_ms(cost(bytes=0, flops=3_000_000_000)) == pytest.approx(3)


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
    source = Path(__file__).parents[1] / "kernels" / "plugins" / "executing_driver.c"
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


def test_a_gpu_that_a_runtime_does_not_take(module: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    engines = module("engines")
    specs: list[object] = [object(), object(), None]

    def find_spec(_: str) -> object:
        return specs.pop(0)

    monkeypatch.setattr(engines, "find_spec", find_spec)
    with pytest.raises(CapaError, match=r"tensorrt-rtx cannot build these graphs for compute capability 9\.0"):
        engines.target_for("tensorrt-rtx", "9.0")
    assert engines.target_for("tensorrt-rtx", "8.9").require_engine().compute_capabilities == ("8.9",)
    with pytest.raises(CapaError, match="tensorrt-rtx is not installed"):
        engines.target_for("tensorrt-rtx", "8.9")


def test_engines_are_skipped_without_a_driver(module: Callable[[str], Any], tmp_path: Path) -> None:
    engines = module("engines")
    [row] = module("cases").rows(engines.cases(tmp_path, "tensorrt-rtx", engines.VARIANTS))
    assert "no GPU" in row["skipped"]


def logits(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((4, 64)).astype(np.float32)


def test_the_gate_on_engines(module: Callable[[str], Any]) -> None:
    reference = module("reference")
    kept = np.arange(304)
    wanted = Trace(logits(), [kept])
    assert reference.figures(Trace(logits() * 1.001, [kept]), wanted)["kept_iou"] == 1
    with pytest.raises(AssertionError, match="cosine"):
        reference.figures(Trace(logits(1), [kept]), wanted)
    with pytest.raises(AssertionError, match="cosine"):
        reference.figures(Trace(logits() * np.nan, [kept]), wanted)
    # Of a flip at the cut, the set is judged; its logits are of other tokens.
    flipped = np.append(kept[:-1], 305)
    assert set(reference.figures(Trace(logits(1), [flipped]), wanted)) == {"kept_iou"}
    with pytest.raises(AssertionError, match="kept_iou"):
        reference.figures(Trace(logits(), [kept + 40]), wanted)


@pytest.fixture
def workload(module: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The model of a tiny checkpoint in place of the large one, with a head size that there are kernels for."""
    rope = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [4, 6, 6]}
    model = random_model(num_attention_heads=2, num_key_value_heads=1, rope_parameters=rope)
    folder = save_model(tmp_path / "checkpoint", model)

    def checkpoint(_: Path) -> Path:
        return folder

    monkeypatch.setattr(module("reference"), "checkpoint", checkpoint)
    return model


def test_the_reference_is_onnx_runtimes(workload: Any, module: Callable[[str], Any], tmp_path: Path) -> None:
    reference = module("reference")
    graphs = reference.ReferenceGraphs(tmp_path)
    dense, capa = (graphs.reference(dense=dense) for dense in (True, False))
    assert [len(one.kept[0]) for one in (dense, capa)] == [1024 + 48, 256 + 48]
    assert dense.logits.shape == capa.logits.shape == (4, dense.logits.shape[1])
    again = reference.ReferenceGraphs(tmp_path).reference(dense=False)
    model = reference.OnnxModel(graphs.folder)
    own = reference.trace(model, 256, again.tokens)
    np.testing.assert_array_equal(own.logits, again.logits)
    assert reference.figures(own, capa)["cosine"] == pytest.approx(1)


@pytest.mark.trt
@pytest.mark.slow
def test_engines_are_built_for_one_gpu(workload: Any, module: Callable[[str], Any], tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs the extra rtx")
    engines, graphs = module("engines"), module("reference").ReferenceGraphs(tmp_path)
    target = engines.target_for("tensorrt-rtx", "8.9")
    costs = {}
    for variant in (engines.Variant("python", "external"), engines.Variant("none", "external", dense=True)):
        folder = tmp_path / "engines" / variant.name
        costs[variant] = engines._build(
            graphs.folder, folder, target, variant, engines._plugins(variant.plugins, "8.9", tmp_path)
        )
        assert all((folder / f"{name}.engine").is_file() for name in variant.files)
        weights = json.loads((folder / "llm" / "decode.weights.json").read_text(encoding="utf-8"))
        assert all((folder / "llm" / entry["file"]).is_file() for entry in weights.values())
    first, second = costs.values()
    # What has no CAPA nodes is built once.
    assert set(first) > set(second) == {"llm/prefill_s", "llm/prefill_MB"}


@pytest.mark.slow
def test_peers_compiled_or_not_decode_alike(module: Callable[[str], Any], model: Any) -> None:
    peers = module("peers")
    plain = peers.HuggingFaceDecoder(model, "cpu")
    compiled = peers.HuggingFaceDecoder(model, "cpu", partial(torch.compile, backend="eager"))
    torch.testing.assert_close(plain.prefill(), compiled.prefill(), rtol=1e-4, atol=1e-4)
    (seconds, own), (_, other) = plain.decode(3), compiled.decode(3)
    assert len(seconds) == 3
    torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)
