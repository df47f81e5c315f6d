"""The commands of README and docs do what they say, and their links lead somewhere."""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from inspect import signature
from pathlib import Path
from typing import Any

import pytest

import capa_export
from benchmarks import front
from capa_export.base.errors import ExitCode
from capa_export.cli import main
from capa_export.config.recipe import load_recipe
from capa_export.data.scenes import SHAPES
from tests.conftest import noise
from tests.models.shortened import first_layers
from tests.quantizing import FORMATS, quantize

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def doc(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def commands(text: str, section: str = "") -> list[list[str]]:
    """The words of each command in the first shell block of a page, or of a section of it."""
    text = text.split(f"\n## {section}\n")[1] if section else text
    block = re.search(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    assert block is not None
    return [shlex.split(line) for line in block[1].replace("\\\n", " ").splitlines()]


@pytest.mark.giant
@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_demo_prints_what_the_readme_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (command,) = commands(README, "Try it")
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
    # The tutorial builds the same from Python, and asks it what the picture at the head shows.
    monkeypatch.chdir(tmp_path)
    shutil.copy(front.PICTURE, "scene.png")
    names: dict[str, Any] = {"capa_export": capa_export}
    for block in python_blocks()[1:]:
        exec(block.replace("out/python", str(ROOT / "out" / "demo")), names)  # noqa: S102 - it is the page's code that is tested.
    printed = capsys.readouterr().out
    assert printed.startswith(answer) and f"\ncapa@2:0.75 {answer}\n" in printed
    found = names["found"]
    assert found.question == front.QUESTION
    drawn = json.loads((front.FOLDER / "kept.json").read_text(encoding="utf-8"))
    answers = {method.method: method.answer for method in found.methods}
    assert answers == {method["method"]: method["answer"] for method in drawn["methods"]}
    assert answers["dense"] == answers["capa@2:0.75"] == answer != answers["random@2:0.75"]
    wrong = {name.partition("@")[0].partition(":")[0] for name, said in answers.items() if said != answer}
    named = re.search(r"of (\w+) methods at the same ratio, (.*?)\s+miscount", README, flags=re.DOTALL)
    assert named is not None and named[1] == "twelve" and len(answers) == 13
    assert set(re.findall(r"`([\w-]+)`", named[2])) == wrong


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", doc("tutorials/python.md"), flags=re.DOTALL)


def all_commands(tutorial: str) -> list[list[str]]:
    """The words of each command of a tutorial."""
    blocks = re.findall(r"```sh\n(.*?)```", doc(f"tutorials/{tutorial}.md"), flags=re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").splitlines()]


@pytest.mark.giant
@pytest.mark.exhaustive
def test_the_commands_for_your_own_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install, build, run = commands(README, "On an RTX card")
    assert install[:2] == ["pip", "install"]
    monkeypatch.chdir(tmp_path)
    # The first layers of the shipped checkpoint are of the same architecture: they stand where the user's would.
    checkpoint, pictures = (tmp_path / build[build.index(before) + 1] for before in ("build", "--images"))
    first_layers(checkpoint)
    pictures.mkdir(parents=True)
    for index in range(2):
        noise(224, 140, index).save(pictures / f"{index}.png")
    noise(224, 140).convert("RGB").save(run[run.index("--image") + 1])
    # All that is left out of these commands is time.
    assert main([*build[1:], "--validation-samples", "4"]) == 0
    assert "parity: passed" in capsys.readouterr().out
    on_gpu = run.index("--engine")
    assert main([*run[1:on_gpu], *run[on_gpu + 2 :]]) == 0
    assert capsys.readouterr().out.strip()
    assert commands(doc("building.md")) == [install, build, [*run[:on_gpu], *run[on_gpu + 2 :]]]

    # The other devices' builds differ in target and folder alone.
    for section, target in (("On a Jetson Orin", "orin"), ("On a Jetson Thor", "thor"), ("Without a GPU", "onnx")):
        blocks = commands(README, section)
        (other,) = (command for command in blocks if command[:2] == ["capa-export", "build"])
        assert [*other[: other.index("--target")], "--target", "rtx", "--out", "out/qwen"] == build
        assert other[other.index("--target") + 1] == target
        for command in blocks:
            if command[:2] == ["capa-export", "plan"]:
                assert main(command[1:]) == 0
            if command[0] == "scp":
                assert main(["engine", "out/qwen", "--target", target]) == 0
                assert (tmp_path / "out/qwen/engines" / target / "build.sh").is_file()
                assert command[2] == f"{other[-1]}/engines/{target}"
    evaluate, explain, tune = commands(doc("methods.md"))
    questions = [{"image": "cat.jpg", "question": f"what color is the {shape} ?", "answer": "red"} for shape in SHAPES]
    Path(evaluate[evaluate.index("--data") + 1]).write_text("\n".join(map(json.dumps, questions)), encoding="utf-8")
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
    for option in re.findall(r"^\| `(--[\w-]+)", doc("building.md"), flags=re.MULTILINE):
        assert option in known, option
    codes = re.findall(r"^\| ([\d, ]+) \|", doc("building.md"), flags=re.MULTILINE)
    assert {int(code) for cell in codes for code in cell.split(",")} == set(ExitCode)
    layout = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("```")[1]
    for path in re.findall(r"^  ([\w/.]+)", layout, flags=re.MULTILINE):
        assert (ROOT / "capa_export" / path).exists(), path
    named = {path.split("/")[0] for path in re.findall(r"^  ([\w/.]+)", layout, flags=re.MULTILINE)}
    inside = {
        path.name for path in (ROOT / "capa_export").iterdir() if path.name[0] not in "_." and path.name != "py.typed"
    }
    assert named == inside


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda path: path.name
)
def test_every_link_leads_to_a_file(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        assert ":" in target or (page.parent / target).exists(), target


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 200


@pytest.mark.exhaustive
def test_the_tutorials_run_but_for_the_download_and_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The shipped checkpoint in AutoAWQ's layout stands where the 7B would."""
    lines = all_commands("jetson")
    plan, doctor, build = ([*line[1:]] for line in lines if line[0] == "capa-export")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(load_recipe("tiny-qwen25vl").checkpoint, build[1])
    quantize(tmp_path / build[1], FORMATS["AutoAWQ"])
    pictures = tmp_path / build[build.index("--images") + 1]
    pictures.mkdir()
    for index in range(2):
        noise(224, 140, index).save(pictures / f"{index}.png")
    assert main(plan) == 0
    said = capsys.readouterr().out
    assert "weights embedded: " in said and "--weights joined" in said and "has room: " in said
    assert main(doctor) == 0
    assert main([*build, "--validation-samples", "4"]) == 0
    said = capsys.readouterr()
    assert "parity: passed" in said.out and "kept in 4 bits" in said.err
    (copied,) = (line[2] for line in lines if line[0] == "scp")
    assert (tmp_path / copied / "build.sh").is_file()

    page = doc("tutorials/your-data.md")
    for kind, file in (("json", "questions.jsonl"), ("toml", "gates.toml")):
        (text,) = re.findall(rf"```{kind}\n(.*?)```", page, flags=re.DOTALL)
        Path(file).write_text(text, encoding="utf-8")
    shutil.copy(front.PICTURE, "cat.jpg")
    evaluate, validate = ([*line[1:]] for line in all_commands("your-data"))
    assert main([*evaluate, "--samples", "11"]) == 0
    assert "random@2:0.75" in capsys.readouterr().out
    assert main([validate[0], build[build.index("--out") + 1], *validate[2:], "--samples", "4"]) == 0
    assert "0.9995" in Path("out/orin/parity.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", ["jetson", "your-data"])
def test_the_tutorials_commands_have_the_options_they_name(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    own = [line[1:] for line in all_commands(page) if line[0] == "capa-export"]
    assert len(own) > 1
    for verb, *words in own:
        assert main([verb, "--help"]) == 0
        assert {word for word in words if word.startswith("--")} <= set(
            re.findall(r"--[a-z][\w-]*", capsys.readouterr().out)
        )


def test_python_tutorial_builds_with_arguments_that_there_are() -> None:
    (call,) = (node for node in ast.walk(ast.parse(python_blocks()[0])) if isinstance(node, ast.Call))
    signature(capa_export.build).bind(**{word.arg: None for word in call.keywords if word.arg})


def test_every_command_is_documented_as_it_is() -> None:
    command = [sys.executable, "-m", "typer", "capa_export.cli", "utils", "docs", "--name", "capa-export"]
    done = subprocess.run([*command, "--title", "Every command"], cwd=ROOT, capture_output=True, text=True, check=True)
    # The help's sentences keep the spaces that ended their lines.
    assert doc("commands.md").split() == done.stdout.split(), "run `make docs`"
