"""What `--help` says: options under headings, summaries that are not cut, examples that parse."""

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import capa_export.cli as cli_package
from capa_export.base.errors import ExitCode
from capa_export.cli import app
from capa_export.cli.examples import EXAMPLES
from capa_export.cli.options import PANELS
from tests.cli.conftest import Cli

ROOT: Any = get_command(app)


def commands(group: Any = ROOT, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every command with the words that call it, groups left out."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{path}{name} ")
        else:
            yield f"{path}{name}", command


COMMANDS = dict(commands())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_stands_under_a_heading_and_whole_at_80_columns(
    name: str, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = cli(*name.split(), "--help")
    assert code == ExitCode.OK and out == cli(*name.split(), "-h")[1]
    assert max(len(line) for line in out.splitlines()) <= 80
    for parameter in COMMANDS[name].params:
        if parameter.param_type_name == "option" and not parameter.hidden:
            assert parameter.rich_help_panel in PANELS, parameter.name
            assert f"  {', '.join(sorted(parameter.opts, key=len))}" in out
    headings = [line[:-1] for line in out.splitlines() if line.endswith(":") and line[0] != " "]
    assert headings == [heading for heading in ("Arguments", *PANELS) if heading in headings]


def test_a_wide_terminal_is_used(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert 140 < max(len(line) for line in cli("build", "--help")[1].splitlines()) <= 160


def test_summaries_are_not_cut(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = cli("--help")[1] + cli("plugins", "-h")[1]
    for name, command in COMMANDS.items():
        summary = re.escape(command.help.partition(".")[0])
        assert re.search(rf"^  {name.split()[-1]} +{summary}\.$", shown, re.MULTILINE), name


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_parse(name: str) -> None:
    text = "\n".join(EXAMPLES[name]).replace("\\\n", "")
    assert text
    for line in text.splitlines():
        words = shlex.split(line)
        assert words[: 1 + len(name.split())] == ["capa-export", *name.split()]
        COMMANDS[name].make_context(name, words[1 + len(name.split()) :])


def test_a_shell_completes(monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    monkeypatch.setenv("_CAPA_EXPORT_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "capa-export build --prec")
    monkeypatch.setenv("COMP_CWORD", "2")
    done = subprocess.run(
        [sys.executable, "-c", "from capa_export.cli import main; main()"], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["--precision"]
    monkeypatch.delenv("_CAPA_EXPORT_COMPLETE")
    assert "--install-completion" in cli("--help")[1]


@pytest.mark.parametrize("file", sorted(Path(cli_package.__file__).parent.glob("*.py")), ids=lambda path: path.stem)
def test_no_command_ignores_an_option(file: Path) -> None:
    """An option that a command's body never reads would be taken and have no effect."""
    for command in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(command, ast.FunctionDef) and not command.name.startswith("_"):
            options = {each.arg for each in (*command.args.args, *command.args.kwonlyargs)}
            read = {node.id for part in command.body for node in ast.walk(part) if isinstance(node, ast.Name)}
            assert options <= read, command.name


@pytest.mark.parametrize("budget", ["nan", "-1"])
def test_a_budget_of_a_build_is_read(budget: str, cli: Cli) -> None:
    code, _, err = cli("build", "--model", "tiny-qwen25vl", "--dry-run", "--ffn-budget", budget)
    assert code == ExitCode.USAGE and f"--ffn-budget {budget}: nats of KL, 0 or more" in err
