"""What a plain `pip install` gives: all commands but those that build and run engines, which name the extra."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXTRAS = ("av", "cryptography", "cuda", "datasets", "ray", "tensorrt", "tensorrt_rtx", "triton")
SCRIPT = f"""
import sys
sys.modules.update(dict.fromkeys({EXTRAS!r}))
from capa_export.cli import main
sys.exit(main(sys.argv[1:]))
"""
HINT = 'pip install ".[rtx]" in a checkout of capa-export'


def run(*words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, *words], capture_output=True, text=True, check=False, env=environment
    )


@pytest.mark.slow
def test_a_build_without_engines_and_an_answer(tmp_path: Path) -> None:
    out = str(tmp_path / "bundle")
    few = ["--samples", "4", "--validation-samples", "2"]
    built = run("build", "--model", "tiny-qwen25vl", "--target", "onnx", *few, "--out", out)
    assert built.returncode == 0, built.stderr
    assert "parity: passed" in built.stdout
    scene = Path(__file__).parents[2] / "graphs" / "checkpoints" / "tiny-qwen25vl" / "scene.png"
    asked = run("run", out, "--image", str(scene), "--prompt", "How many shapes are blue?")
    assert (asked.returncode, asked.stdout.strip()) == (0, "2"), asked.stderr
    refused = run("engine", out, "--target", "rtx")
    needs = f"error: target rtx needs tensorrt-rtx, which is not installed: {HINT}"
    assert (refused.returncode, refused.stderr.strip()) == (5, needs)


def test_the_doctor_says_what_is_missing() -> None:
    found = run("doctor", "--target", "rtx")
    assert found.stdout.count(HINT) == 2, found.stdout
    assert run("doctor", "--target", "onnx").returncode == 0


def test_plugins_name_the_extra(tmp_path: Path) -> None:
    built = run("plugins", "build", "--out", str(tmp_path / "library.so"))
    assert built.returncode != 0
    assert built.stderr.strip() == f"error: kernels need triton: {HINT}"
