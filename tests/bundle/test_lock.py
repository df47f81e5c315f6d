"""One process at a time works in a bundle, and a second is told which one."""

import subprocess
import sys
from pathlib import Path

import pytest

from capa_export.base.errors import CapaError
from capa_export.bundle.lock import locked

HOLD = """
import sys
from pathlib import Path
from capa_export.bundle.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_blocks_of_one_process_are_nested_and_leave_nothing(tmp_path: Path) -> None:
    with locked(tmp_path):
        with locked(tmp_path):
            assert len(list(tmp_path.iterdir())) == 2
        assert len(list(tmp_path.iterdir())) == 2
    assert not list(tmp_path.iterdir())


def test_a_second_process_is_told_who_is_there(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin is not None and other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(CapaError, match=rf"process {other.pid} \(.*\) is at work in it; wait"), locked(tmp_path):
            pytest.fail("it is held")
        other.stdin.close()
        assert other.wait(timeout=60) == 0
    with locked(tmp_path):
        pass


def test_a_process_that_dies_leaves_the_folder_free(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        other.kill()
        other.wait(timeout=60)
        with locked(tmp_path):
            assert list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())
