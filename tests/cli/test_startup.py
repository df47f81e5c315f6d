"""What a bundle's commands import: an answer needs neither torch nor transformers, nor a list of models ONNX."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from capa_export.base.errors import ExitCode
from tests.cli.conftest import Cli

HEAVY = "torch transformers onnx_ir onnxscript sympy huggingface_hub"
SCRIPT = """
import sys

class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {refused!r}.split():
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Refused())
from capa_export.cli import main
code = main()
print(*sorted({{name.split(".")[0] for name in sys.modules}}), file=sys.stderr)
sys.exit(code)
"""


def run_without(refused: str, *arguments: object) -> tuple[str, set[str]]:
    """What a command prints in a process of its own that cannot import some packages, and what it imported."""
    command = [sys.executable, "-c", SCRIPT.format(refused=refused), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    return done.stdout, set(done.stderr.splitlines()[-1].split())


def test_an_answer_needs_no_torch(bundle: Path, pictures: Path, cli: Cli) -> None:
    ask = ("run", bundle, "--prompt", "what color ?", "--image", pictures / "0.png", "--max-new-tokens", 4)
    code, expected, _ = cli(*ask)
    assert code == ExitCode.OK
    said, imported = run_without(HEAVY, *ask)
    assert said == expected
    assert imported.isdisjoint(HEAVY.split()) and "onnxruntime" in imported


@pytest.mark.parametrize("command", [["models"], ["targets"], ["selectors"]], ids=" ".join)
def test_a_list_needs_no_onnx(command: list[str]) -> None:
    said, imported = run_without(HEAVY, *command, "--json")
    assert said and imported.isdisjoint({*HEAVY.split(), "onnx", "onnxruntime"})


def test_help_needs_next_to_nothing() -> None:
    """Rich, which typer would draw panels with, takes a quarter of a second to import."""
    script = """
import sys
from typer.main import get_command
from capa_export.cli import app, main
for name in get_command(app).commands:
    assert main([name, "--help"]) == 0
print(*sorted({name.split(".")[0] for name in sys.modules}), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    imported = set(done.stderr.splitlines()[-1].split())
    assert done.stdout.count("Usage: capa-export") == 17
    assert imported.isdisjoint({*HEAVY.split(), "onnx", "onnxruntime", "numpy", "rich"})


def test_a_bundle_is_inspected_without_torch(bundle: Path) -> None:
    said, imported = run_without(HEAVY, "inspect", bundle, "--json")
    assert said and imported.isdisjoint(HEAVY.split())


def test_warnings_of_transformers_are_kept_from_a_command() -> None:
    script = """
from capa_export.cli import main
main(["targets"])
from transformers.utils import logging
logging.get_logger("transformers.models").warning("a warning")
logging.get_logger("transformers.models").error("an error")
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ))
    assert "an error" in done.stderr and "a warning" not in done.stderr
