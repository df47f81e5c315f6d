"""Engines that a device builds: cut short anywhere, they are those before or the new ones, and never some of each."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from capa_export.base.errors import CapaError
from capa_export.bundle.store import Bundle
from capa_export.trt import builder, kit_switch
from capa_export.trt.kit_file import KitError
from capa_export.trt.kit_switch import UNCHECKED
from capa_export.trt.stage import build_kit
from tests.cut_short import DiskState, Recording, recorded
from tests.recorded import record
from tests.targets import one_gpu
from tests.trt.test_builder import NUM_KEEP
from tests.trt.test_kit_file import write_kit

ENGINES = ("visual/visual", "llm/prefill", "llm/decode")
KIT = "engines/rtx"


@pytest.fixture(autouse=True)
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine is the device, whose TensorRT writes what `PLAN` says."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("os.fsync", lambda _: None)
    monkeypatch.setattr(builder, "check_device", lambda _: None)
    monkeypatch.setattr(builder, "check_version", lambda *_: None)
    monkeypatch.setattr(builder, "read_version", lambda *_: "10.13")
    monkeypatch.setattr(builder, "_run", built)
    monkeypatch.setenv("PLAN", "new")


def built(_: Any, task: Mapping[str, Any], _file: Path, _env: Any, log: Path, _install: str) -> dict[str, Any]:
    """In the place of TensorRT's own process."""
    import os

    if os.environ["PLAN"] == "none":
        raise KitError("refused")
    for part in ("plan", "layers"):
        Path(task[part]).write_text(f"{os.environ['PLAN']} {part}")
    log.write_text(os.environ["PLAN"])
    return {"version": "10.13", "warnings": [], "peak_rss_bytes": 1}


def build(kit: Path) -> None:
    """As `build.sh` does where the kit lies alone."""
    for _ in builder.build(kit, worker=[], say=lambda _: None):
        pass


def build_in_bundle(folder: Path) -> None:
    build_kit(folder / KIT)


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kit whose engines were built."""
    kit = write_kit(tmp_path / "old", one_gpu(values=NUM_KEEP), *ENGINES)
    with monkeypatch.context() as before:
        before.setenv("PLAN", "old")
        build(kit)
    return kit


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle with such a kit."""
    kit = write_kit(tmp_path / "old" / KIT, one_gpu(values=NUM_KEEP), *ENGINES)
    files = [path.relative_to(tmp_path / "old").as_posix() for path in kit.rglob("*") if path.is_file()]
    record(tmp_path / "old", "engine/rtx", files, result={"kit": KIT, "engines": {}})
    with monkeypatch.context() as before:
        before.setenv("PLAN", "old")
        build_in_bundle(tmp_path / "old")
    return tmp_path / "old"


def engines(folder: Path) -> dict[str, bytes]:
    """By name what the engines are; another program may read them, and knows nothing of switches."""
    return {path.name: path.read_bytes() for path in folder.rglob("*.engine") if ".b" not in str(path)}


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def states(old: Path, work: Callable[[Path], object], tmp_path: Path) -> Recording:
    folder = Path(shutil.copytree(old, tmp_path / "recorded"))
    return recorded(partial(work, folder), folder, tmp_path / "recording")


def written(state: DiskState, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    state.write(folder)
    return folder


def test_a_kit_that_is_cut_short(alone: Path, tmp_path: Path) -> None:
    recording = states(alone, build, tmp_path)
    new = Path(shutil.copytree(alone, tmp_path / "new"))
    build(new)
    before, after = engines(alone), engines(new)
    assert before.keys() == after.keys() and len(after) == len(ENGINES) and before != after
    assert set(files_of(new)) == set(files_of(alone)), "nothing is left"
    found = list[dict[str, bytes]]()
    for state in {*recording.killed, *recording.without_power}:
        folder = written(state, tmp_path / "one")
        kept = engines(folder)
        found.append(kept)
        assert kept.items() <= before.items() or kept.items() <= after.items()
        if len(kept) < len(before):
            # The rest is there, and waits for the next build to begin, whatever becomes of that.
            assert (folder / ".built").is_dir()
        build(folder)
        assert engines(folder) == after
        assert files_of(folder) == files_of(new)
    assert before in found and after in found
    assert engines(written(recording.afterwards, tmp_path / "one")) == after


def test_a_build_that_is_refused_puts_in_order_what_was_cut_short(
    alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recording = states(alone, build, tmp_path)
    after = engines(written(recording.killed[-1], tmp_path / "new"))
    monkeypatch.setenv("PLAN", "none")
    for number, state in enumerate(recording.killed):
        folder = written(state, tmp_path / "one")
        with pytest.raises(KitError, match="refused"):
            build(folder)
        assert engines(folder) in (engines(alone), after), number
        assert not list(folder.glob(".b*"))


def test_a_bundle_that_is_cut_short_says_what_its_kit_holds(bundle: Path, tmp_path: Path) -> None:
    recording = states(bundle, build_in_bundle, tmp_path)
    before, found = engines(bundle), list[dict[str, bytes]]()
    for state in {*recording.killed, *recording.without_power}:
        folder = written(state, tmp_path / "one")
        Bundle.open(folder, read_all=True).verify("engine/rtx")
        found.append(engines(folder))
        assert len(set(found[-1].values())) == 1 and found[-1].keys() == before.keys()
    assert {*map(str, found)} == {str(before), str(engines(written(recording.killed[-1], tmp_path / "one")))}
    folder = written(recording.killed[len(recording.killed) // 2], tmp_path / "one")
    build_in_bundle(folder)
    assert files_of(folder) == files_of(written(recording.killed[-1], tmp_path / "two"))


def test_a_bundle_hears_of_a_kit_that_was_built_in_it(bundle: Path) -> None:
    stage = Bundle.open(bundle).stage("engine/rtx")
    assert (stage["result"]["kit"], stage["result"]["engines"].keys()) == (KIT, set(ENGINES))
    assert {f"{KIT}/{name}.engine" for name in ENGINES} < set(stage["files"])
    (bundle / KIT / "llm/decode.engine").write_bytes(b"another")
    with pytest.raises(CapaError, match=r"decode\.engine"):
        Bundle.open(bundle).verify("engine/rtx")


def test_two_builds_at_once(alone: Path) -> None:
    program = """
import fcntl, os, sys
fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)
print(flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-c", program, alone]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline()
        with pytest.raises(KitError, match="another build is at work in it"):
            build(alone)
        other.kill()
    build(alone)


@pytest.mark.parametrize("name", [".built", ".building", ".built/llm"])
def test_leftovers_that_lead_elsewhere(alone: Path, tmp_path: Path, name: str) -> None:
    """A kit that somebody sends moves no file of the host, and removes none."""
    victim = tmp_path / "host"
    (victim / "llm").mkdir(parents=True)
    for file in ("old", "prefill.engine", "llm/prefill.engine"):
        (victim / file).write_text("mine")
    (alone / name).parent.mkdir(exist_ok=True)
    (alone / name).symlink_to(victim)
    before = files_of(victim)
    with pytest.raises(KitError, match="is a link that leads outside"):
        build(alone)
    assert files_of(victim) == before


@pytest.mark.parametrize("name", ["llm/prefill.engine", "llm/prefill.log", "golden.log", f"llm/prefill{UNCHECKED}"])
def test_a_pipe_in_the_place_of_what_is_written_is_refused(alone: Path, name: str) -> None:
    (alone / name).unlink(missing_ok=True)
    os.mkfifo(alone / name)
    with pytest.raises(KitError, match=f"{name}: is a pipe, a socket or a device: put a file in its place"):
        build(alone)


@pytest.mark.parametrize("name", [".built", ".building"])
def test_a_pipe_in_the_place_of_a_leftover_goes(alone: Path, name: str) -> None:
    os.mkfifo(alone / name)
    build(alone)
    assert {*engines(alone).values()} == {b"new plan"}


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_leftovers_of_another_kind(alone: Path, kind: str) -> None:
    for name in (".built", ".building", f"llm/prefill{UNCHECKED}", kit_switch.LIBRARY):
        path = alone / name
        path.mkdir() if kind == "folder" else path.write_text("x")
    build(alone)
    assert {*engines(alone).values()} == {b"new plan"}
    assert not [path for path in alone.iterdir() if path.name.startswith(".")]
