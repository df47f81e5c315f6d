"""Too small a disk is said before anything is written, or in one line where it fills up."""

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from capa_export.base.disk import check_disk, disk_guard, free_bytes
from capa_export.base.errors import CapaError, ExitCode


@pytest.fixture(autouse=True)
def _thousand_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def usage(place: Path) -> SimpleNamespace:
        assert place == tmp_path
        return SimpleNamespace(free=1000)

    monkeypatch.setattr(shutil, "disk_usage", usage)


def test_a_folder_that_is_not_there_yet_has_its_parents_disk(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "a" / "b") == 1000


def test_no_more_than_is_free(tmp_path: Path) -> None:
    check_disk(tmp_path / "a", 1000)
    with pytest.raises(CapaError, match=r"a: 1001 bytes are needed, 1000 are free") as error:
        check_disk(tmp_path / "a", 1001)
    assert error.value.code == ExitCode.PREFLIGHT


@pytest.mark.parametrize(
    ("number", "problem"),
    [
        (errno.ENOSPC, "the disk filled up: 7 bytes are needed, 1000 are free"),
        (errno.EDQUOT, "the disk filled up"),
        (errno.EACCES, "cannot be written: Permission denied"),
    ],
)
def test_a_failed_write_is_one_line(tmp_path: Path, number: int, problem: str) -> None:
    with pytest.raises(CapaError, match=problem) as error, disk_guard(tmp_path / "x", 7):
        raise OSError(number, os.strerror(number))
    assert error.value.code == ExitCode.EXPORT and str(tmp_path / "x") in str(error.value)


def test_other_failures_pass(tmp_path: Path) -> None:
    with pytest.raises(KeyError), disk_guard(tmp_path / "x", 7):
        raise KeyError
