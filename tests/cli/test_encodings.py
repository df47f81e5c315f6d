"""Terminals that have few characters show what they can, whatever is printed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

NAME = "caf\u00e9-\u2603-\u4f60\u597d"
SCRIPT = """
import sys
from itertools import groupby
from capa_export.cli import main
from capa_export.model.prompt import Prompter
Prompter.decode = lambda self, token_ids: "yes, a caf\\u00e9 \\u2603"
commands = [list(words) for between, words in groupby(sys.argv[1:], "+".__eq__) if not between]
print("codes", *map(main, commands), flush=True)
"""
BARE = "C without Python's help"
TERMINALS = {
    "latin-1": ("latin-1", {"PYTHONIOENCODING": "latin-1"}),
    "ascii": ("ascii", {"PYTHONIOENCODING": "ascii"}),
    "C": ("utf-8", {"LC_ALL": "C", "LANG": "C"}),
    BARE: ("ascii", {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}),
}


@pytest.fixture(scope="module")
def named(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(bundle, tmp_path_factory.mktemp("named") / NAME))


@pytest.mark.parametrize(
    "terminal", ["latin-1", BARE, *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("ascii", "C"))]
)
def test_every_command_prints_on_every_terminal(
    terminal: str, bundle: Path, named: Path, recipe: Path, pictures: Path
) -> None:
    encoding, settings = TERMINALS[terminal]
    shown = Path(shutil.copy(pictures / "0.png", named.parent / f"{NAME}.png"))
    # ONNX Runtime takes no path that the system's encoding does not have.
    asked = bundle if terminal == BARE else named
    ask = ["run", asked, "--prompt", "what color ?", "--image"]
    commands = [
        ["models"],
        ["plan", "--model", recipe, "--target", "onnx"],
        ["inspect", named],
        [*ask, shown],
        [*ask, shown, "--json"],
        [*ask, shown.with_suffix(".gone")],
        ["inspect", named / "gone"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *(str(word) for command in commands for word in (*command, "+"))],
        capture_output=True,
        check=False,
        env={**os.environ, **settings},
    )
    # Strictly, so that nothing else is written.
    said, talk = (text.decode(encoding) for text in (done.stdout, done.stderr))
    assert said.splitlines()[-1] == "codes 0 0 0 0 0 3 3", talk
    assert "Traceback" not in talk and talk.count("error: ") == 2
    assert said.count("yes, a caf") == 2
