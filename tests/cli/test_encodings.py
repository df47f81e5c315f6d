"""Terminals that have few characters show what they can, whatever is printed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

NAME = "caf\u00e9-\u2603-\u4f60\u597d"
ANSWER = """
import sys
from capa_export.cli import main
from capa_export.prompt import Prompter
Prompter.decode = lambda self, token_ids: "yes, a caf\\u00e9 \\u2603"
sys.exit(main())
"""
TERMINALS = {
    "latin-1": ("latin-1", {"PYTHONIOENCODING": "latin-1"}),
    "ascii": ("ascii", {"PYTHONIOENCODING": "ascii"}),
    "C": ("utf-8", {"LC_ALL": "C", "LANG": "C"}),
    "C without Python's help": ("ascii", {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}),
}


@pytest.fixture(scope="module")
def named(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(bundle, tmp_path_factory.mktemp("named") / NAME))


@pytest.mark.parametrize("terminal", TERMINALS)
def test_every_command_prints_on_every_terminal(terminal: str, named: Path, recipe: Path, pictures: Path) -> None:
    encoding, settings = TERMINALS[terminal]
    shown = Path(shutil.copy(pictures / "0.png", named.parent / f"{NAME}.png"))
    for command in (
        ["models"],
        ["plan", "--model", recipe, "--target", "onnx"],
        ["doctor", named, "--target", "onnx"],
        ["inspect", named],
        ["run", named, "--prompt", "what color ?", "--image", shown],
        ["run", named, "--prompt", "what ?", "--image", shown.with_suffix(".gone")],
        ["inspect", named / "gone"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", ANSWER, *map(str, command)],
            capture_output=True,
            check=False,
            env={**os.environ, **settings},
        )
        # Strictly, so that nothing else is written.
        said, talk = (text.decode(encoding) for text in (done.stdout, done.stderr))
        assert done.returncode in (0, 2, 3), (command, talk)
        assert "Traceback" not in talk and (said or talk), (command, talk)
        if command[0] == "run" and done.returncode == 0:
            assert "yes, a caf" in said
