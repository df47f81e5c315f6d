"""What commands read of a bundle that they have read before."""

import os
from pathlib import Path

import pytest

from capa_export.base.errors import ExitCode
from tests.cli.conftest import Cli, preflight

DATA = "onnx/llm/model.onnx.data"
LONG_AGO = 10**18


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_change_with_its_time_set_back_is_found_where_everything_is_read(
    spare: Path, pictures: Path, cli: Cli
) -> None:
    ask = ("run", spare, "--prompt", "what color ?", "--image", pictures / "0.png", "--max-new-tokens", 1)
    path = spare / DATA
    os.utime(path, ns=(LONG_AGO, LONG_AGO))
    code, out, _ = cli("inspect", spare)
    assert code == ExitCode.OK and "every file is as it was built\n" in out
    code, out, _ = cli("inspect", spare)
    assert code == ExitCode.OK and "by size and time since they were last read (--verify reads all)" in out
    assert cli(*ask, "--verify")[0] == ExitCode.OK

    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    preflight(cli, f"{path}: missing or changed", *ask)
    os.utime(path, ns=(LONG_AGO, LONG_AGO))
    # Its refusal left no stamp behind.
    preflight(cli, f"{path}: missing or changed", *ask)

    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(LONG_AGO, LONG_AGO))
    assert cli(*ask)[0] == ExitCode.OK
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(LONG_AGO, LONG_AGO))
    assert cli(*ask)[0] == ExitCode.OK
    for command in ((*ask, "--verify"), ("inspect", spare, "--verify"), ("validate", spare, "--images", pictures)):
        preflight(cli, f"{path}: missing or changed", *command)
