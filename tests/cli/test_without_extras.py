"""What a plain `pip install` gives: all but what builds and runs engines, which names the extra."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXTRAS = ("av", "cryptography", "cuda", "datasets", "ray", "tensorrt", "tensorrt_rtx", "triton")
WITHOUT = f"import sys; sys.modules.update(dict.fromkeys({EXTRAS!r}))\n"
COMMAND = "from capa_export.cli import main; sys.exit(main(sys.argv[1:]))"
HINT = 'pip install ".[rtx]" in a checkout of capa-export'


def python(code: str, *words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", WITHOUT + code, *words],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=cwd,
    )


def run(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return python(COMMAND, *words, cwd=cwd)


@pytest.mark.giant
@pytest.mark.slow
def test_a_build_and_an_answer_from_python_and_by_commands(tmp_path: Path) -> None:
    """The example of docs/api.md prints no more than it says, and the command finds its build to be what it makes."""
    scene = shutil.copy(ROOT / "graphs" / "checkpoints" / "tiny-qwen25vl" / "scene.png", tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    (example,) = (block for block in blocks if "import" in block)
    done = python(example, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\nblue", "")
    same = ["--schedule", "capa@2:0.75", "--samples", "8", "--validation-samples", "4", "--out", "out/tiny"]
    built = run("build", "--model", "tiny-qwen25vl", "--target", "onnx", *same, cwd=tmp_path)
    assert built.returncode == 0 and built.stderr.count("up to date") == 4, built.stderr
    assert "parity: passed" in built.stdout
    asked = run("run", "out/tiny", "--image", scene, "--prompt", "How many shapes are blue?", cwd=tmp_path)
    assert (asked.returncode, asked.stdout.strip()) == (0, "2"), asked.stderr
    refused = run("engine", "out/tiny", "--target", "rtx", cwd=tmp_path)
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
