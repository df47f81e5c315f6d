"""Processes that end with the one that started them, and with all that they started."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from capa_export.base.parent import tied
from tests.orphans import SLEEPER, await_started, ended_with_parent, have_ended

STARTING = """
import subprocess, sys
from capa_export.base.parent import tied
subprocess.run(tied(["/bin/sh", "-c", f"{sys.executable} sleeper.py & wait"]), cwd=FOLDER)
"""


def test_all_of_it_ends_with_a_command_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    assert ended_with_parent(f"FOLDER = {str(tmp_path)!r}\n{STARTING}", tmp_path, 2)


@pytest.fixture
def heard() -> Iterator[None]:
    """Ctrl-C is not ignored, as it is in the background of a script."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
def test_all_of_it_ends_when_it_is_told_to(tmp_path: Path, ending: signal.Signals) -> None:
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    (started := tmp_path / "started").mkdir()
    environment = {**os.environ, "STARTED": str(started)}
    with subprocess.Popen(tied([sys.executable, tmp_path / "sleeper.py"]), env=environment) as process:
        await_started(process, started, 2)
        process.send_signal(ending)
        assert process.wait() == -signal.SIGKILL
    assert have_ended(started)


def test_ctrl_c_is_ignored_where_the_one_that_asks_ignores_it() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        command = tied(["/bin/sh", "-c", "echo begun; read line; exit 7"])
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stdout.readline()
            process.send_signal(signal.SIGINT)
            process.communicate(b"go on\n")
        assert process.returncode == 7
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("script", "code"), [("exit 7", 7), ("kill -9 $$", -9), ("kill -6 $$", -6), ("true", 0)])
def test_how_it_ended_is_passed_on(script: str, code: int) -> None:
    run = subprocess.run(
        tied(["/bin/sh", "-c", f"cat; echo out; {script}"]), input="in ", capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stdout, run.stderr) == (code, "in out\n", "")


def test_elsewhere_a_command_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert tied(["/bin/sh", "-c", "true"]) == ["/bin/sh", "-c", "true"]
