"""The bundle folder: stages are skipped when current, replaced whole or not at all, and checked on load."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from capa_export.base.errors import CapaError, ExitCode
from capa_export.bundle.lock import LOCK
from capa_export.bundle.store import MANIFEST, Bundle, digest_of
from tests.recorded import record


def write(text: str) -> Any:
    def work(scratch: Path) -> dict[str, Any]:
        (scratch / "made" / "deep").mkdir(parents=True)
        (scratch / "made" / "deep" / "file").write_text(text)
        return {"text": text}

    return work


def test_a_stage_runs_once_per_key(tmp_path: Path) -> None:
    bundle = Bundle(tmp_path / "bundle")
    record, ran = bundle.run_stage("make", {"a": 1}, ["made"], write("one"))
    assert ran and record["result"] == {"text": "one"} and record["seconds"] >= 0
    assert list(record["files"]) == ["made/deep/file"]
    record, ran = bundle.run_stage("make", {"a": 1}, ["made"], write("never"))
    assert not ran and record["result"] == {"text": "one"}
    record, ran = bundle.run_stage("make", {"a": 2}, ["made"], write("two"))
    assert ran and (bundle.folder / "made/deep/file").read_text() == "two"


def test_a_changed_output_runs_the_stage_again(tmp_path: Path) -> None:
    bundle = Bundle(tmp_path)
    bundle.run_stage("make", 1, ["made"], write("one"))
    (tmp_path / "made/deep/file").write_text("edited")
    with pytest.raises(CapaError, match=r"made/deep/file: missing or changed since it was built"):
        bundle.verify("make")
    assert bundle.run_stage("make", 1, ["made"], write("one"))[1]
    bundle.verify("make")


def test_a_failed_stage_leaves_what_was_there(tmp_path: Path) -> None:
    bundle = Bundle(tmp_path)
    bundle.run_stage("make", 1, ["made"], write("one"))

    def fail(scratch: Path) -> dict[str, Any]:
        write("half")(scratch)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bundle.run_stage("make", 2, ["made"], fail)
    assert (tmp_path / "made/deep/file").read_text() == "one"
    assert sorted(path.name for path in tmp_path.iterdir()) == [MANIFEST, "made"]
    bundle.verify("make")


def test_a_full_disk_is_one_clear_line(tmp_path: Path) -> None:
    def full(_scratch: Path) -> dict[str, Any]:
        raise OSError(28, "No space left on device")

    with pytest.raises(CapaError, match="No space left on device; free some space"):
        Bundle(tmp_path).run_stage("make", 1, ["made"], full)


def test_opening_what_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(CapaError, match="not a bundle"):
        Bundle.open(tmp_path)
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(CapaError, match="damaged manifest"):
        Bundle.open(tmp_path)
    (tmp_path / MANIFEST).write_text(json.dumps({"version": 99, "stages": {}}))
    with pytest.raises(CapaError, match="version 99"):
        Bundle.open(tmp_path)


def test_a_moved_bundle_is_still_good(tmp_path: Path) -> None:
    Bundle(tmp_path / "a").run_stage("make", 1, ["made"], write("one"))
    (tmp_path / "a").rename(tmp_path / "b")
    Bundle.open(tmp_path / "b").verify("make")


def test_digest_does_not_depend_on_order() -> None:
    assert digest_of({"a": 1, "b": [2]}) == digest_of({"b": [2], "a": 1}) != digest_of({"a": 1, "b": [3]})


def test_somebody_elses_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "my.txt").write_text("mine")
    with pytest.raises(
        CapaError, match=r"holds made and no capa_manifest\.json; choose an empty or a new folder"
    ) as raised:
        Bundle(tmp_path).run_stage("make", 1, ["made"], write("one"))
    assert raised.value.code == ExitCode.USAGE
    assert (tmp_path / "made" / "my.txt").read_text() == "mine"


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_place_that_cannot_be_written(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CapaError, match="Not a directory; choose") as raised:
        Bundle(tmp_path / place).run_stage("make", 1, ["made"], write("one"))
    assert raised.value.code == ExitCode.PREFLIGHT


def test_what_commands_left_goes_and_what_is_somebodys_own_stays(tmp_path: Path) -> None:
    bundle = Bundle(tmp_path)
    bundle.run_stage("make", 1, ["made"], write("one"))
    for left in (".partial", f".{MANIFEST}.x.partial", ".commit", "film.partial"):
        (tmp_path / left / "deep").mkdir(parents=True)
    bundle.run_stage("make", 2, ["made"], write("two"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [MANIFEST, "film.partial", "made"]


def test_a_manifest_that_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    bundle = Bundle(tmp_path)
    bundle.run_stage("make", 1, ["made"], write("one"))
    before = bundle.manifest
    with pytest.raises(ValueError, match="command"):
        bundle.update(command=[1])
    with bundle.scratch("made"), pytest.raises(ValueError, match="command"):
        bundle.replace([], command=[1])
    assert bundle.manifest == before


def test_a_stage_outdates_what_was_made_from_it(tmp_path: Path) -> None:
    def work(scratch: Path) -> dict[str, Any]:
        (scratch / "late" / "deep").mkdir(parents=True)
        (scratch / "late" / "deep" / "file").write_text("x")
        return {}

    bundle = Bundle(tmp_path)
    bundle.run_stage("make", 1, ["made"], write("one"))
    bundle.run_stage("late/a", 1, ["late"], work)
    bundle.run_stage("make", 2, ["made"], write("two"), outdates=["late/"])
    assert list(bundle.manifest["stages"]) == ["make"]
    assert not (tmp_path / "late").exists()


def test_nothing_made_leaves_no_folder(tmp_path: Path) -> None:
    def fail(_scratch: Path) -> dict[str, Any]:
        raise CapaError("no")

    with pytest.raises(CapaError):
        Bundle(tmp_path / "out").run_stage("make", 1, ["made"], fail)
    assert not (tmp_path / "out").exists()


HOLD = """
import sys
from pathlib import Path
from capa_export.bundle.store import Bundle

def work(scratch):
    (scratch / "made" / "deep").mkdir(parents=True)
    (scratch / "made" / "deep" / "file").write_text("theirs")
    print("at work", flush=True)
    sys.stdin.readline()
    return {}

Bundle(Path(sys.argv[1])).run_stage("make", 1, ["made"], work)
"""


def test_two_commands_in_one_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "at work\n"
        with pytest.raises(CapaError, match=rf"out: process {other.pid} \(-c .*/out\) is at work in it") as raised:
            Bundle(tmp_path / "out").run_stage("make", 2, ["made"], write("mine"))
        assert raised.value.code == ExitCode.PREFLIGHT
        other.communicate("\n")
    assert (tmp_path / "out/made/deep/file").read_text() == "theirs"
    Bundle(tmp_path / "out").run_stage("make", 2, ["made"], write("mine"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [MANIFEST, "made"]


def test_a_command_that_was_killed_holds_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "at work\n"
        other.kill()
    Bundle(tmp_path).run_stage("make", 2, ["made"], write("mine"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [MANIFEST, "made"]


def test_a_command_whose_arguments_are_no_utf8(tmp_path: Path) -> None:
    out = os.fsdecode(os.fsencode(tmp_path) + b"/out-\xff")
    command = [sys.executable, "-c", HOLD, out]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "at work\n"
        with pytest.raises(CapaError, match=rf"process {other.pid} \(-c .*/out-\\udcff'\) is at work in it"):
            Bundle(Path(out)).run_stage("make", 2, ["made"], write("mine"))
        other.communicate("\n")
    assert sorted(path.name for path in Path(out).iterdir()) == [MANIFEST, "made"]


def test_the_locked_file_itself_is_never_written(tmp_path: Path) -> None:
    with Bundle(tmp_path).claimed():
        # Windows would refuse it.
        assert (tmp_path / LOCK).stat().st_size == 0


def test_a_result_that_lacks_what_is_asked_for_is_one_line(tmp_path: Path) -> None:
    bundle = record(tmp_path, "export", [], result={"precision": "fp16"})
    assert bundle.said("export", "precision") == "fp16"
    with pytest.raises(
        CapaError, match=r"stage 'export' says nothing of weights; `capa-export build .*` runs it again"
    ):
        bundle.said("export", "weights")
