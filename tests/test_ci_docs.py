"""The jobs in docs/ci.md are whole: they parse, both run the same commands, and the commands do what they say."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from capa_export.base.toml import read_toml
from capa_export.config.gates import GateFile, Limits
from capa_export.report.schema import read_parity
from tests.forked import commands

ROOT = Path(__file__).resolve().parent.parent
DOC = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")


def block(section: str, language: str) -> str:
    """The first block in a language of a section."""
    text = DOC.split(f"\n## {section}\n")[1].split("\n## ")[0]
    found = re.search(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)
    assert found is not None, (section, language)
    return found[1]


def steps(building: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Name of a step -> its commands."""
    return {step["name"]: step["run"].splitlines() for step in building if "run" in step}


GITHUB = yaml.safe_load(block("GitHub Actions", "yaml"))
STEPS = steps(GITHUB["jobs"]["parity"]["steps"])
GITLAB = yaml.safe_load(block("GitLab", "yaml"))["parity"]
RELEASE = steps(yaml.safe_load(block("Against the last release", "yaml")))


def test_both_jobs_run_the_same_commands() -> None:
    assert STEPS["install"] == GITLAB["before_script"]
    own = [line for name, lines in STEPS.items() if name not in {"install", "summary"} for line in lines]
    assert own == GITLAB["script"]
    assert RELEASE["compare"] == block("Against the last release", "sh").splitlines()[1:]


def test_what_is_kept_of_a_job_is_what_the_commands_write() -> None:
    upload = next(step for step in GITHUB["jobs"]["parity"]["steps"] if "upload-artifact" in step.get("uses", ""))
    kept = {*upload["with"]["path"].split(), *GITLAB["artifacts"]["paths"], GITLAB["artifacts"]["reports"]["junit"]}
    assert kept == {f"out/{file}" for file in ("tiny/report.html", "tiny/parity.json", "junit.xml", "parity.md")}


def test_the_gate_file_holds_the_defaults_it_says_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "gates.toml"
    path.write_text(block("Against the last release", "toml"), encoding="utf-8")
    assert read_toml(path, GateFile).compare.model_copy(update={"prefill_slowdown": None}) == Limits()


@pytest.mark.giant
@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_commands_build_validate_and_catch_the_fault(tmp_path: Path) -> None:
    (tmp_path / "ci").mkdir()
    (tmp_path / "ci/fault.py").write_text(block("A fault, to see that the gate holds", "python"), encoding="utf-8")
    (tmp_path / "ci/gates.toml").write_text(block("Against the last release", "toml"), encoding="utf-8")
    # A fork where a user's shell starts an interpreter, as `make demo` and the wheel's test do.
    (tmp_path / "bin").mkdir()
    path = os.pathsep.join([str(tmp_path / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md")}

    def run(lines: list[str]) -> None:
        # As GitHub runs a step.
        command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", "\n".join(lines)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{lines}\n{done.stdout}\n{done.stderr}"

    with commands(tmp_path / "bin"):
        for name, lines in STEPS.items():
            if name != "install":
                run(lines)
        written = {name: (tmp_path / name).read_text(encoding="utf-8") for name in ("out/junit.xml", "out/parity.md")}
        assert "<testcase" in written["out/junit.xml"] and "<failure" not in written["out/junit.xml"]
        assert (tmp_path / "summary.md").read_text(encoding="utf-8") == written["out/parity.md"]
        assert all((tmp_path / "out/tiny" / file).is_file() for file in ("report.html", "parity.json"))
        assert not read_parity(tmp_path / "out/faulty/parity.json").passed
        shutil.copytree(tmp_path / "out/tiny", tmp_path / "released/tiny")
        # The second needs a GPU.
        run(block("On a device", "sh").splitlines()[:1])
        assert read_parity(tmp_path / "out/tiny/parity.json").oracle == "golden"
        run(RELEASE["compare"])
