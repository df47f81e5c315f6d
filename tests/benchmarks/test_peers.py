"""The side-by-side benchmark's own machinery: costs, errors, turns and the table."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

ADAPTERS = Path(__file__).parents[2] / "benchmarks" / "peer"


def adapter_module(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ADAPTERS))
    return importlib.import_module(name)


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Any:
    return adapter_module("processes", monkeypatch)


@pytest.fixture
def markdown(monkeypatch: pytest.MonkeyPatch) -> Any:
    return adapter_module("table", monkeypatch).markdown


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.mark.parametrize(
    ("log", "line"),
    [
        ("Traceback:\n  File x\nValueError: first\nsecond line\n", "ValueError: first"),
        ("ValueError: cause\n\nDuring handling:\nRuntimeError: effect\nbye\n", "RuntimeError: effect"),
        ("a.b.SomeException: why\n", "a.b.SomeException: why"),
        ("ERROR: No matching distribution\n", "ERROR: No matching distribution"),
        ("10%\r20%\rOSError: /some/where/file.json is missing", "OSError: file.json is missing"),
        ("no exception here\nlast words\n", "last words"),
        ("", "no output"),
    ],
)
def test_the_first_line_of_what_ended_a_log(processes: Any, log: str, line: str) -> None:
    assert processes.first_error(log) == line


def test_a_long_error_is_cut_between_words(processes: Any) -> None:
    line = processes.first_error("ValueError: " + "word " * 100)
    assert len(line) < 230
    assert line.endswith("word ...")


def test_the_cost_of_a_process(processes: Any, tmp_path: Path) -> None:
    outcome = processes.measured_run(python("print(len(b'x' * 200_000_000))"), tmp_path / "log", 60)
    assert outcome["error"] is None
    assert outcome["stdout"] == "200000000\n"
    assert 200_000_000 < outcome["peak_memory_bytes"] < 400_000_000
    assert outcome["processor_seconds"] > 0


def test_the_cost_is_not_the_callers(processes: Any, tmp_path: Path) -> None:
    ballast = b"x" * 300_000_000
    outcome = processes.measured_run(python("pass"), tmp_path / "log", 60)
    assert len(ballast) > outcome["peak_memory_bytes"] > 1_000_000


@pytest.mark.parametrize(
    ("code", "timeout", "error"),
    [
        ("raise KeyError('lost')", 60, "KeyError: 'lost'"),
        ("import os; os.abort()", 60, "ended by SIGABRT"),
        ("import time; print(flush=True); time.sleep(60)", 0.5, "TimeoutError: not finished after 0.5 s"),
    ],
)
def test_a_process_that_fails(processes: Any, tmp_path: Path, code: str, timeout: float, error: str) -> None:
    assert processes.measured_run(python(code), tmp_path / "log", timeout)["error"] == error


def test_a_worker_that_dies_says_why(processes: Any, tmp_path: Path) -> None:
    code = "print('{\"a\": [1.0]}', flush=True); input(); raise MemoryError('too long a prompt')"
    worker = processes.Worker(python(code), tmp_path / "log", 60)
    assert worker.first == {"a": [1.0]}
    assert worker.run("a") is None
    assert worker.error == "MemoryError: too long a prompt"
    assert worker.run("a") is None


ADAPTER = """
import os, sys
sys.path.insert(0, {folder!r})
import numpy as np
from serve import main

def prefill(checkpoint, out, feed):
    print("libraries talk")
    os.system("echo so do their children")
    return {{"a": lambda: feed["x"] * 2, "b": lambda: sum(range(10**6)) + feed["x"]}}

main(prefill=prefill)
"""


def test_workers_take_turns(processes: Any, tmp_path: Path) -> None:
    script, feed = tmp_path / "adapter.py", tmp_path / "feed.npz"
    script.write_text(ADAPTER.format(folder=str(ADAPTERS)), encoding="utf-8")
    np.savez(feed, x=np.arange(3))
    command = [sys.executable, str(script), "prefill", "checkpoint", "out", str(feed)]
    worker = processes.Worker(command, tmp_path / "log", 60)
    try:
        assert worker.error is None
        assert worker.first["a"] == [0, 2, 4]
        for variant in "abba":
            wall, processor = worker.run(variant)
            assert wall > 0
            assert processor >= 0
    finally:
        worker.close()
    assert "so do their children" in (tmp_path / "log").read_text(encoding="utf-8")


def test_a_worker_that_cannot_start_says_why(processes: Any, tmp_path: Path) -> None:
    worker = processes.Worker(python("raise ImportError('no such runtime')"), tmp_path / "log", 60)
    assert worker.error == "ImportError: no such runtime"
    assert worker.first == {}


def test_a_checkpoint_as_transformers_4_reads_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    rope = {"rope_type": "default", "rope_theta": 50.0, "mrope_section": [4, 6, 6]}
    config = {"model_type": "llava", "dtype": "float16", "text_config": {"rope_parameters": rope}}
    tensors = {
        "vision_tower.post_layernorm.weight": np.ones(3, np.float16),
        "language_model.model.norm.weight": np.arange(2, dtype=np.float32),
    }
    (checkpoint / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, checkpoint / "model.safetensors")
    copy = adapter_module("transformers4", monkeypatch).downgraded(checkpoint, tmp_path / "out")
    changed = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    assert changed["torch_dtype"] == "float16"
    assert changed["text_config"]["rope_theta"] == 50.0
    assert changed["text_config"]["rope_scaling"]["type"] == "mrope"
    loaded = load_file(copy / "model.safetensors")
    assert loaded.keys() == {"vision_tower.vision_model.post_layernorm.weight", "language_model.model.norm.weight"}
    assert loaded["language_model.model.norm.weight"].tolist() == [0, 1]
    assert load_file(checkpoint / "model.safetensors").keys() == tensors.keys()


def report(**peers: Any) -> dict[str, Any]:
    entry = {
        "checkpoint": "tiny",
        "family": "qwen25vl",
        "decoder": "hidden 64, 5 layers",
        "parameters": 1e6,
        "prune_layer": 2,
        "tokens": {"visual": 64, "text": 48, "kept": 16},
        "questions": 4,
        "peers": peers,
    }
    return {"date": "2026-11-21", "machine": "m", "command": "c", "ratio": 0.75, "checkpoints": [entry]}


def prefill(**milliseconds: float) -> dict[str, Any]:
    return {"error": None, "variants": {name: {"processor_ms": value} for name, value in milliseconds.items()}}


OURS = {
    "installs": True,
    "scope": "yes",
    "export": {"error": None, "seconds": 1.0, "peak_memory_bytes": 5e8, "bytes": 24e6},
    "tensorrt_rtx": {"prefill.onnx": None, "decode.onnx": "Scan: no reason given"},
    "prefill": prefill(**{"dense": 100.0, "pruned": 40.0, "decode behind dense": 10.0, "decode behind pruned": 8.0}),
    "answers": {"error": None, "variants": {"dense": {"accuracy": 1.0}, "pruned": {"accuracy": 0.5}}},
}


def row(text: str, label: str) -> list[str]:
    [line] = [line for line in text.splitlines() if line.startswith(f"| {label} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_row_compares_like_with_like(markdown: Any) -> None:
    answers = {"dense": {"accuracy": 1.0, "prompt_tokens": 80.0}, "pruned": {"accuracy": 0.75, "prompt_tokens": 32.0}}
    peer = OURS | {"prefill": prefill(dense=150.0, pruned=30.0), "answers": {"error": None, "variants": answers}}
    text = markdown(report(**{"capa-export": OURS, "OpenVINO GenAI": peer | {"tensorrt_rtx": {}}}))
    ours = row(text, r"**capa-export**, nothing removed")
    assert ours[1:] == ["yes", "1.0", "0.50", "24.0", "1 of 2", "100.0", "1.00", "-", "10.0", "1.00", "100.0 %"]
    assert row(text, "OpenVINO GenAI")[5:8] == ["no ONNX", "150.0", "1.50"]
    assert row(text, "OpenVINO GenAI, CDPruner")[6:] == ["30.0", "0.75", "-", "-", "-", "75.0 %"]
    assert "- capa-export, TensorRT-RTX, decode.onnx: `Scan: no reason given`" in text


def test_steps_of_int4_stand_beside_their_prefill(markdown: Any) -> None:
    times = {"dense": 80.0, "decode behind dense": 2.5, "pruned, inputs rounded": 20.0}
    peer = OURS | {"answers": {"error": None, "variants": {}}}
    peer["prefill"] = prefill(**times, **{"decode behind pruned, inputs rounded": 2.0})
    text = markdown(report(**{"capa-export": OURS, "capa-export, INT4": peer}))
    assert row(text, "**capa-export**, INT4, nothing removed")[6:] == ["80.0", "0.80", "-", "2.5", "0.25", "-"]
    assert row(text, "**capa-export**, INT4, pruned, inputs rounded")[6:] == ["20.0", "0.50", "-", "2.0", "0.25", "-"]


def test_pruning_that_does_nothing_is_not_shown_as_pruning(markdown: Any) -> None:
    answers = {name: {"accuracy": 1.0, "prompt_tokens": 80.0} for name in ("dense", "pruned")}
    peer = OURS | {"answers": {"error": None, "variants": answers}}
    text = markdown(report(**{"capa-export": OURS, "OpenVINO GenAI": peer}))
    assert row(text, "OpenVINO GenAI, CDPruner")[6:] == ["-", "-", "-", "-", "-", "ignored"]
    assert "the prompt stays at 80 tokens" in text


def test_failures_are_shown(markdown: Any) -> None:
    failed = {"installs": True, "scope": "yes", "export": OURS["export"] | {"error": "ValueError: unsupported"}}
    missing = {"installs": False, "scope": "yes", "export": {"error": "ERROR: no such version"}}
    text = markdown(report(**{"capa-export": OURS, "one": failed, "two": missing}))
    assert row(text, "one")[1:6] == ["no", "1.0", "0.50", "-", "-"]
    assert "- one, export: `ValueError: unsupported`" in text
    assert row(text, "two")[1] == "not installed"
    assert "- two, install: `ERROR: no such version`" in text
