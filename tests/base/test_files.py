"""Files that are written whole or not at all."""

import os
from functools import partial
from pathlib import Path

import pytest

from capa_export.base.errors import CapaError
from capa_export.base.files import refuse_special, remove, replacing, write_whole


def test_a_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    with replacing(path) as file:
        file.write(b"half")
        file.flush()
        assert not path.exists()
    assert path.read_bytes() == b"half"
    assert [entry.name for entry in path.parent.iterdir()] == ["file.txt"]


def test_what_was_there_stays_where_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_whole(path, "old\n")

    def fail() -> None:
        with replacing(path) as file:
            file.write(b"new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text(encoding="utf-8") == "old\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.txt"]


def test_others_may_read_what_the_umask_lets_them(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write_whole(tmp_path / "file.txt", "é")
    finally:
        os.umask(before)
    assert (tmp_path / "file.txt").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "file.txt").read_bytes() == "é".encode()


def test_what_is_removed_is_gone_whatever_it_is(tmp_path: Path) -> None:
    """A pipe that stayed would be waited for by whoever writes there next."""
    (tmp_path / "target").write_text("mine")
    path = tmp_path / "x"
    for make in (path.touch, path.mkdir, partial(os.mkfifo, path), partial(path.symlink_to, "target"), lambda: None):
        make()
        remove(path)
        assert not os.path.lexists(path)
    assert (tmp_path / "target").read_text() == "mine"


def test_pipes_and_devices_are_refused_by_name(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x")
    for path in (tmp_path / "x", Path("/dev/zero")):
        with pytest.raises(CapaError, match=f"{path}: is a pipe, a socket or a device; name a file"):
            refuse_special(path)
    refuse_special(tmp_path)
    refuse_special(tmp_path / "nothing")
