"""The README's commands do what the README says."""

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from capa_export.base.errors import ExitCode
from capa_export.cli import main
from capa_export.config.recipe import load_recipe
from capa_export.data.scenes import SHAPES
from tests.conftest import noise

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands(section: str) -> list[list[str]]:
    """The words of each command in the first shell block of a section."""
    text = README.split(f"\n## {section}\n")[1]
    block = re.search(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    assert block is not None
    return [shlex.split(line) for line in block[1].replace("\\\n", " ").splitlines()]


@pytest.mark.giant
@pytest.mark.slow
def test_the_demo_prints_what_the_readme_shows() -> None:
    (command,) = commands("Try it")
    # As from a shell: inside `make test`, make would talk of the folders it enters.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "parity: passed" in done.stdout
    shown = re.search(r"```\n(\$ capa-export run.*?)```", README, flags=re.DOTALL)
    assert shown is not None
    _, visual, answer, *_ = shown[1].splitlines()
    assert done.stdout.splitlines()[-1] == answer
    assert visual in done.stderr.splitlines()


@pytest.mark.giant
def test_the_commands_for_your_own_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install, build, run = commands("Use it on your own checkpoint")
    assert install[:2] == ["pip", "install"]
    monkeypatch.chdir(tmp_path)
    # The shipped checkpoint is of the same architecture: it stands where the user's would.
    checkpoint, pictures = (tmp_path / build[build.index(before) + 1] for before in ("build", "--images"))
    shutil.copytree(load_recipe("tiny-qwen25vl").checkpoint, checkpoint)
    pictures.mkdir(parents=True)
    for index in range(2):
        noise(224, 140, index).save(pictures / f"{index}.png")
    noise(224, 140).convert("RGB").save(run[run.index("--image") + 1])
    assert main(build[1:]) == 0
    assert "parity: passed" in capsys.readouterr().out
    assert main(run[1:]) == 0
    assert capsys.readouterr().out.strip()

    evaluate, explain, tune = commands("Which method, and why")
    questions = [{"image": "cat.jpg", "question": f"what color is the {shape} ?", "answer": "red"} for shape in SHAPES]
    Path(evaluate[evaluate.index("--data") + 1]).write_text("\n".join(map(json.dumps, questions)), encoding="utf-8")
    # All that is left out of these commands is time.
    fewer = ["--samples", "11"]
    assert main([*evaluate[1:], *fewer]) == 0
    assert "capa@2:0.75" in capsys.readouterr().out
    explain[2] = build[build.index("--out") + 1]
    assert main(explain[1:]) == 0
    assert Path(capsys.readouterr().out.strip()).is_file()
    assert main([*tune[1:], *fewer]) == 0
    assert load_recipe(tune[tune.index("--out") + 1]).prune.schedule


def test_every_option_and_path_of_the_tables_exists(capsys: pytest.CaptureFixture[str]) -> None:
    main(["build", "--help"])
    known = capsys.readouterr().out
    for option in re.findall(r"^\| `(--[\w-]+)", README, flags=re.MULTILINE):
        assert option in known, option
    codes = re.findall(r"^\| ([\d, ]+) \|", README, flags=re.MULTILINE)
    assert {int(code) for cell in codes for code in cell.split(",")} == set(ExitCode)
    layout = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("```")[1]
    for path in re.findall(r"^  ([\w/.]+)", layout, flags=re.MULTILINE):
        assert (ROOT / "capa_export" / path).exists(), path
    named = {path.split("/")[0] for path in re.findall(r"^  ([\w/.]+)", layout, flags=re.MULTILINE)}
    inside = {
        path.name for path in (ROOT / "capa_export").iterdir() if path.name[0] not in "_." and path.name != "py.typed"
    }
    assert named == inside
