"""Engines for servers: built here where the GPU and its TensorRT are, and a kit for where they are not."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from capa_export.base.errors import CapaError, ExitCode
from capa_export.bundle.store import Bundle
from capa_export.cli import main
from capa_export.config.target import load_target
from capa_export.trt import builder, golden_run, stage
from capa_export.trt.kit import write_kit
from capa_export.trt.kit_file import KitError, read_kit
from tests.fake_driver import has_driver

ROOT = Path(__file__).parents[2]
NO_DRIVER = pytest.mark.skipif(has_driver(), reason="this machine has an NVIDIA driver")


def command(variables: dict[str, str], *words: str) -> tuple[int, str, list[str]]:
    """Exit code, output and what was said, of a command in a process that finds these."""
    paths = os.pathsep.join([*filter(None, [variables.get("PYTHONPATH")]), str(ROOT)])
    environment = {**os.environ, **variables, "PYTHONPATH": paths}
    run = subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), *words], env=environment, capture_output=True, text=True, check=False
    )
    return run.returncode, run.stdout, run.stderr.splitlines()


@pytest.mark.exhaustive
def test_with_gpu_and_tensorrt_engines_are_built_here_and_held_to_the_golden(
    bundle: Bundle, device: dict[str, str]
) -> None:
    words = ["engine", str(bundle.folder), "--target", "h100", "--plugins", "none", "--json"]
    server = {**device, "STANDIN_SM": "90"}
    code, output, lines = command(server, *words)
    assert code == 0, lines
    result = json.loads(output)
    assert set(result["engines"]) == {"visual/visual", "llm/prefill", "llm/decode"}
    assert (result["runtime"], result["compute_capabilities"]) == ("tensorrt", ["9.0"])
    assert {one["runtime"] for one in result["engines"].values()} == {"10.3.0"}
    opened = Bundle(bundle.folder)
    opened.verify("engine/h100")
    assert opened.stage("engine/h100")["result"] == result
    log = bundle.folder / "engines/h100/golden.log"
    assert log.is_file()
    # What is there is not built again, but for another TensorRT; and one that makes wrong code leaves it as it is.
    before = log.stat().st_mtime_ns
    code, _, lines = command(server, *words)
    assert (code, log.stat().st_mtime_ns) == (0, before), lines
    code, _, lines = command({**server, "STANDIN_VERSION": "10.4.0", "MISCOMPILED": "decode"}, *words)
    assert code == ExitCode.ENGINE
    assert lines[-1].startswith("error: llm/decode.engine computes something else than the golden: logits: cosine ")
    assert log.stat().st_mtime_ns != before
    opened.verify("engine/h100")


def test_another_gpu_or_tensorrt_is_one_line_before_anything_runs(device: dict[str, str], tmp_path: Path) -> None:
    words = ["build", "--model", "tiny-qwen25vl", "--target", "ada", "--out", str(tmp_path / "out")]
    remedy = "; or write a kit for such a machine with --kit"
    began = "error: engines for ada are built where its GPU and TensorRT are: "
    for variables, problem in (
        ({}, "the GPU here has compute capability 8.7, the kit is for ada, which has 8.9"),
        ({"STANDIN_SM": "89", "STANDIN_VERSION": "10.1"}, "TensorRT here is 10.1, ada takes >=10.3,<12"),
    ):
        code, _, (line,) = command({**device, **variables}, *words)
        assert code == ExitCode.ENGINE
        assert line.startswith(began + problem) and line.endswith(remedy), line
    assert not (tmp_path / "out").exists()


@NO_DRIVER
def test_without_a_gpu_it_says_what_is_missing_and_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["build", "--model", "tiny-qwen25vl", "--target", "h100", "--out", str(tmp_path / "out")]
    assert main(words) == ExitCode.ENGINE
    (line,) = capsys.readouterr().err.splitlines()
    assert "no NVIDIA driver here (libcuda.so.1)" in line and line.endswith("with --kit")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(stage, "check_device", lambda _: None)
    monkeypatch.setattr(stage, "find_spec", lambda _: None)
    with pytest.raises(CapaError, match=r"tensorrt is not installed: pip install \"\.\[tensorrt\]\".*--kit$"):
        stage.check_runtime(load_target("h100"))
    stage.check_runtime(load_target("h100").for_kit())


def test_a_kit_for_a_server_is_one_for_its_own_machine(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["engine", str(bundle.folder), "--target", "ampere", "--plugins", "none", "--kit"]) == 0
    assert capsys.readouterr().out.startswith("kit: engines/ampere in the bundle; copy that folder to the device")
    assert read_kit(bundle.folder / "engines/ampere")["compute_capabilities"] == ["8.0"]
    assert main(["engine", str(bundle.folder), "--target", "rtx", "--kit"]) == ExitCode.USAGE
    assert main(["engine", str(bundle.folder), "--on-device", "--kit"]) == ExitCode.USAGE


def test_what_is_built_here_may_have_plugins_in_python_and_no_kit_that_is_sent(bundle: Bundle, tmp_path: Path) -> None:
    kit = tmp_path / "kit"
    write_kit(bundle, load_target("h100"), kit)
    spec = read_kit(kit)
    assert spec["plugins"] == "python"
    assert spec["engines"]["llm/prefill"]["plugins"] == 3, "score, keep and gather"
    assert "`build.sh` does not" in (kit / "README.md").read_text(encoding="utf-8")
    with pytest.raises(KitError, match="python plugins, which no kit that is sent has"):
        list(builder.build(kit))
    with pytest.raises(KitError, match=r"no NVIDIA driver here|the GPU here has|this machine is"):
        list(builder.build(kit, python_plugins=True))


def test_the_golden_run_knows_the_plugins_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    registered: list[Any] = []
    monkeypatch.setattr("capa_export.kernels.plugins.python_plugins.register", registered.append)
    monkeypatch.setattr(golden_run, "_Golden", lambda *_: SimpleNamespace(runs=[]))
    monkeypatch.setattr(golden_run, "_Driver", lambda: None)
    monkeypatch.setattr(golden_run, "_logger", lambda _: None)
    trt = SimpleNamespace(Runtime=lambda _: SimpleNamespace())
    for plugins in ("none", "python"):
        assert not list(golden_run._findings(trt, {"golden": [], "plugins": plugins, "engines": {}}))
    assert registered == [trt]
