"""What was read once is read again when it changed, when it is a copy, and when that is asked for."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from capa_export.base.errors import CapaError
from capa_export.base.files import file_digest
from capa_export.bundle import stamps
from capa_export.bundle.store import Bundle
from tests.recorded import record

DATA = "onnx/llm/model.onnx.data"
YEAR_NS = 365 * 24 * 3600 * 10**9


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/capa-export/stamps"


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """Two files, older than a year."""
    folder = tmp_path / "bundle"
    for file in (DATA, "onnx/llm/config.json"):
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.encode())
        os.utime(path, ns=(0, path.stat().st_mtime_ns - YEAR_NS))
    return record(folder, "export", [DATA, "onnx/llm/config.json"])


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were read for their digests, in order."""
    names: list[str] = []

    def digest(path: Path) -> str:
        names.append(path.name)
        return file_digest(path)

    monkeypatch.setattr(stamps, "file_digest", digest)
    return names


def test_a_file_is_read_once(bundle: Bundle, read: list[str]) -> None:
    assert bundle.verify("export") == 0
    assert sorted(read) == ["config.json", "model.onnx.data"]
    read.clear()
    assert Bundle.open(bundle.folder).verify("export") == 2
    assert Bundle.open(bundle.folder).is_current("export", "key")
    assert not read
    assert Bundle.open(bundle.folder, read_all=True).verify("export") == 0
    assert len(read) == 2


def test_a_folder_may_be_named_in_other_ways(bundle: Bundle, read: list[str], tmp_path: Path) -> None:
    bundle.verify("export")
    read.clear()
    (tmp_path / "link").symlink_to(bundle.folder)
    assert Bundle.open(tmp_path / "link").verify("export") == 2
    assert Bundle.open(bundle.folder / ".." / "bundle").verify("export") == 2
    assert not read


def write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def replaced(path: Path, data: bytes) -> None:
    status = path.stat()
    other = path.with_name(".other")
    other.write_bytes(data)
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(path)


def longer_at_the_same_time(path: Path, data: bytes) -> None:
    status = path.stat()
    path.write_bytes(data + b" ")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("change", [write, replaced, longer_at_the_same_time])
def test_a_change_is_found(bundle: Bundle, change: Callable[[Path, bytes], None]) -> None:
    bundle.verify("export")
    path = bundle.folder / DATA
    change(path, path.read_bytes()[::-1])
    with pytest.raises(CapaError, match="missing or changed since it was built"):
        bundle.verify("export")
    assert not bundle.is_current("export", "key")


def test_only_reading_finds_a_change_whose_time_was_set_back(bundle: Bundle) -> None:
    bundle.verify("export")
    path = bundle.folder / DATA
    status, data = path.stat(), path.read_bytes()
    path.write_bytes(data[::-1])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert bundle.verify("export") == 2
    everything = Bundle.open(bundle.folder, read_all=True)
    for _ in range(2):
        with pytest.raises(CapaError, match="sha256 differs"):
            everything.verify("export")


def test_a_copy_is_read_anew(bundle: Bundle, read: list[str], tmp_path: Path) -> None:
    bundle.verify("export")
    read.clear()
    copy = Bundle.open(Path(shutil.copytree(bundle.folder, tmp_path / "copy")))
    assert copy.verify("export") == 0
    assert len(read) == 2
    assert copy.verify("export") == 2
    # Another bundle in its place.
    shutil.rmtree(bundle.folder)
    shutil.copytree(copy.folder, bundle.folder)
    assert bundle.verify("export") == 0


def test_a_file_that_was_written_just_now_has_no_stamp(bundle: Bundle, read: list[str]) -> None:
    path = bundle.folder / DATA
    path.write_bytes(path.read_bytes())
    for _ in range(2):
        os.utime(path)
        bundle.verify("export")
    assert read.count("model.onnx.data") == 2


def test_the_manifest_says_which_digest(bundle: Bundle) -> None:
    bundle.verify("export")
    stage = bundle.stage("export")
    files = {**stage["files"], DATA: "0" * 64}
    bundle.update(stages={"export": {**stage, "files": files}})
    with pytest.raises(CapaError, match="sha256 differs"):
        bundle.verify("export")


def test_a_cache_that_is_no_cache_is_passed_over(bundle: Bundle, cache: Path, read: list[str]) -> None:
    bundle.verify("export")
    [path] = cache.iterdir()
    kept = json.loads(path.read_text())
    for text in ("", "[]", "{", "[" * 99999, json.dumps({DATA: 3}), json.dumps({DATA: [None] * 4}), "\udcff"):
        path.write_bytes(text.encode(errors="surrogateescape"))
        read.clear()
        bundle.verify("export")
        assert "model.onnx.data" in read
        assert json.loads(path.read_text()) == kept
    shutil.rmtree(cache)
    cache.write_text("no folder")
    for _ in range(2):
        assert bundle.verify("export") == 0


def test_files_that_are_not_asked_for_keep_their_stamps(bundle: Bundle, read: list[str]) -> None:
    bundle.verify("export")
    read.clear()
    bundle.verify("export", weights=False)
    bundle.verify("export")
    assert not read
