"""A replacement that was cut short: who finishes it, who is told to, and what is refused in one."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from capa_export.base.errors import CapaError, ExitCode
from capa_export.bundle import replacement
from capa_export.bundle.replacement import COMMIT, is_committed
from capa_export.bundle.store import MANIFEST, Bundle
from tests.bundle.test_lock import HOLD


def make(bundle: Bundle, text: str) -> None:
    def work(scratch: Path) -> dict[str, Any]:
        (scratch / "made").write_text(text)
        return {}

    bundle.run_stage("make", text, ["made"], work)


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """Interrupted when the new files were on the disk, and not in their places."""
    bundle = Bundle(tmp_path / "bundle")
    make(bundle, "old")

    def interrupt(*_: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(replacement, "_move", interrupt)
        with pytest.raises(KeyboardInterrupt):
            make(bundle, "new")
    assert is_committed(bundle.folder) and (bundle.folder / "made").read_text() == "old"
    return bundle


def test_whoever_opens_it_finishes_it(bundle: Bundle) -> None:
    assert bundle.stage("make")["key"] == bundle.run_stage("make", "new", ["made"], lambda _: {})[0]["key"]
    assert (bundle.folder / "made").read_text() == "new"
    assert sorted(path.name for path in bundle.folder.iterdir()) == [MANIFEST, "made"]


def test_where_it_cannot_be_finished_a_reader_is_told_how(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        with pytest.raises(CapaError, match="interrupted while it put files into their places; `capa-export inspect"):
            Bundle.open(bundle.folder)
    assert is_committed(bundle.folder)
    Bundle.open(bundle.folder).verify("make")


def test_a_process_at_work_is_left_to_finish_it(bundle: Bundle) -> None:
    command = [sys.executable, "-c", HOLD, str(bundle.folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(CapaError, match=f"process {other.pid} .* is at work in it"):
            Bundle.open(bundle.folder)
        assert is_committed(bundle.folder)
        other.communicate("")
    Bundle.open(bundle.folder).verify("make")
    assert (bundle.folder / "made").read_text() == "new"


def test_a_first_bundle_that_was_cut_short_is_nobody_elses(bundle: Bundle) -> None:
    (bundle.folder / MANIFEST).unlink()
    Bundle.open(bundle.folder).verify("make")


@pytest.mark.parametrize(
    ("outputs", "removed"),
    [(["../made"], []), ([], ["../victim"]), ([".lock.partial"], []), (["made", 1], []), ("made", [])],
)
def test_what_leads_elsewhere_is_refused(bundle: Bundle, tmp_path: Path, outputs: object, removed: object) -> None:
    (tmp_path / "victim").touch()
    changes = bundle.folder / COMMIT / "changes.json"
    changes.write_text(json.dumps({"outputs": outputs, "removed": removed}))
    with pytest.raises(CapaError, match="damaged replacement of a stage; delete the folder"):
        Bundle.open(bundle.folder)
    assert (tmp_path / "victim").exists() and (bundle.folder / "made").read_text() == "old"


def test_a_changed_manifest_is_refused(bundle: Bundle) -> None:
    manifest = bundle.folder / COMMIT / MANIFEST
    manifest.write_bytes(manifest.read_bytes().replace(b'"make"', b'"fake"'))
    with pytest.raises(CapaError, match="damaged replacement"):
        Bundle.open(bundle.folder)
    assert (bundle.folder / "made").read_text() == "old"


def test_links_are_not_followed(bundle: Bundle, tmp_path: Path) -> None:
    (bundle.folder / COMMIT).rename(tmp_path / "elsewhere")
    (bundle.folder / COMMIT).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CapaError, match="is a link that leads outside"):
        Bundle.open(bundle.folder)
    assert (tmp_path / "elsewhere/made").read_text() == "new"
    assert (bundle.folder / "made").read_text() == "old"


def test_a_disk_that_fails_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle(tmp_path)
    make(bundle, "old")

    def fail(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(CapaError, match="Input/output error") as raised:
            make(bundle, "new")
    assert raised.value.code == ExitCode.EXPORT
    assert bundle.stage("make")["key"] != "new" and (tmp_path / "made").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == [MANIFEST, "made"]


def test_a_disk_that_syncs_no_folders_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").is_dir():
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    make(Bundle(tmp_path), "new")
    assert (tmp_path / "made").read_text() == "new"
