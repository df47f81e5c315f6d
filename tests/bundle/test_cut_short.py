"""Killed anywhere, or without power, a bundle is the old or the new one, and the next run leaves nothing behind."""

import os
import shutil
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from onnx import helper

from capa_export.base.errors import CapaError
from capa_export.bundle import replacement
from capa_export.bundle.store import MANIFEST, Bundle
from tests.cut_short import DiskState, Recording, killed_at, recorded


@pytest.fixture(autouse=True)
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # Nothing here depends on the real disk.
    monkeypatch.setattr("os.fsync", lambda _: None)


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """Weights of a checkpoint, which bundles link to."""
    path = tmp_path / "model.safetensors"
    path.write_bytes((2).to_bytes(8, "little") + b"{}")
    return path


def export(bundle: Bundle, key: str, shard: Path) -> None:
    graph = helper.make_model(helper.make_graph([], key, [], [])).SerializeToString()
    files = {"onnx/llm/prefill.onnx": graph, "onnx/llm/model.data": key.encode(), f"onnx/llm/only-{key}.json": b"{}"}

    def work(scratch: Path) -> dict[str, Any]:
        write(scratch, files)
        (scratch / "onnx/weights").mkdir()
        os.link(shard, scratch / "onnx/weights/model.safetensors")
        return {"linked": {"onnx/weights/model.safetensors": None}}

    outdates = ["engine/", "validate", "golden"]
    bundle.run_stage("export", key, ["onnx"], work, outdates=outdates, about=lambda: {"recipe": {"name": key}})


def calibrate(bundle: Bundle, key: str, _: Path) -> None:
    def work(scratch: Path) -> dict[str, Any]:
        with bundle.unfinished("calibrate", key) as folder:
            (folder / "sums").write_text(key)
        write(scratch, {"calibration.safetensors": key.encode()})
        return {}

    bundle.run_stage("calibrate", key, ["calibration.safetensors"], work, outdates=["effect", "validate"])


def effect(bundle: Bundle, key: str, _: Path) -> None:
    bundle.run_stage("effect", key, ["effect.json"], writes({"effect.json": key.encode()}), outdates=["validate"])


def engine(bundle: Bundle, key: str, _: Path) -> None:
    def work(scratch: Path) -> dict[str, Any]:
        log = bundle.folder / "llm-prefill.rtx.log"
        log.write_text(key)
        write(scratch, {"engines/rtx/llm/prefill.engine": key.encode()})
        log.replace(scratch / "engines/rtx/llm/prefill.log")
        return {}

    bundle.run_stage("engine/rtx", key, ["engines/rtx"], work)


def kit(bundle: Bundle, key: str, _: Path) -> None:
    def work(scratch: Path) -> dict[str, Any]:
        write(scratch, {"engines/orin/kit.json": key.encode(), "engines/orin/onnx/llm/prefill.onnx.txt": b""})
        os.link(bundle.folder / "onnx/llm/model.data", scratch / "engines/orin/onnx/llm/model.data")
        return {}

    bundle.run_stage("engine/orin", key, ["engines/orin"], work)


def validate(bundle: Bundle, key: str, _: Path) -> None:
    made = {"parity.json": key.encode(), "report.html": key.encode()}
    bundle.run_stage("validate", key, ["parity.json", "report.html"], writes(made))


def golden(bundle: Bundle, key: str, _: Path) -> None:
    bundle.run_stage("golden", key, ["golden"], writes({"golden/0.safetensors": key.encode()}))


def note(bundle: Bundle, key: str, _: Path) -> None:
    bundle.update(hashed={"files": {}, "sha256": {}, "source": key})


STAGES = (calibrate, effect, export, engine, kit, validate, golden, note)
Stage = Callable[[Bundle, str, Path], None]


def write(scratch: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (scratch / name).parent.mkdir(parents=True, exist_ok=True)
        (scratch / name).write_bytes(content)


def writes(files: dict[str, bytes]) -> Callable[[Path], dict[str, Any]]:
    def work(scratch: Path) -> dict[str, Any]:
        write(scratch, files)
        return {}

    return work


def seen(folder: Path) -> dict[str, Any]:
    """What a reader finds in a bundle, every file of which is what its manifest says; without what the stages cost."""
    try:
        bundle = Bundle.open(folder, read_all=True)
    except CapaError as error:
        if "not a bundle" in str(error):
            return {}
        raise
    bundle.verify(*bundle.manifest["stages"])
    stages = {name: [record["key"], record["files"]] for name, record in bundle.manifest["stages"].items()}
    return {**bundle.manifest, "stages": stages}


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@dataclass
class Change:
    """Stages that take a folder from an old bundle to a new one."""

    stages: Sequence[Stage]
    shard: Path
    folder: Path
    """Holds the old one, and the new one beside it."""
    known: dict[DiskState, int] = field(default_factory=dict)
    """Bundles that were checked, and how many stages had been run."""

    def __post_init__(self) -> None:
        shutil.copytree(self.old, self.new)
        self.reached = [seen(self.new)]
        for stage in self.stages:
            stage(Bundle(self.new), "new", self.shard)
            self.reached.append(seen(self.new))
        assert all(before != after for before, after in pairwise(self.reached))

    @property
    def old(self) -> Path:
        return self.folder / "old"

    @property
    def new(self) -> Path:
        return self.folder / "new"

    def run(self, folder: Path) -> None:
        for stage in self.stages:
            stage(Bundle(folder), "new", self.shard)

    def recorded(self) -> Recording:
        """Record the run."""
        folder = Path(shutil.copytree(self.old, self.folder / "recorded"))
        return recorded(partial(self.run, folder), folder, self.folder / "recording")

    def check(self, state: DiskState) -> int:
        """Hold a bundle to be that before or after a stage, and to become the new one; returns after how many it is."""
        if state in self.known:
            return self.known[state]
        folder = self.folder / "one"
        state.write(folder)
        found = seen(folder)
        assert found in self.reached
        as_it_was = state.is_all_of(folder)
        if len(self.known) % 2:
            # Whether or not stamps of it were left.
            shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)
        self.finish(folder)
        if not as_it_was:
            # Where nobody looked at it before.
            state.write(folder)
            self.finish(folder)
        return self.known.setdefault(state, self.reached.index(found))

    def finish(self, folder: Path) -> None:
        """Hold the run over what was left to end in the new bundle and nothing else, and remove it."""
        self.run(folder)
        assert seen(folder) == self.reached[-1]
        assert files_of(folder) == files_of(self.new)
        shutil.rmtree(folder)


def changed(tmp_path: Path, shard: Path, stages: Sequence[Stage], before: Sequence[Stage]) -> Change:
    (tmp_path / "old").mkdir()
    for stage in before:
        stage(Bundle(tmp_path / "old"), "old", shard)
    return Change(stages, shard, tmp_path)


def slow(*stages: Stage, before: Sequence[Stage] = STAGES, marks: Sequence[pytest.MarkDecorator] = ()) -> Any:
    return pytest.param(stages, before, marks=[pytest.mark.slow, *marks])


@pytest.mark.parametrize(
    ("stages", "before"),
    [
        ((export,), STAGES),
        ((note,), STAGES),
        ((export,), ()),
        # These are replaced as what `export` writes is.
        slow(calibrate, before=(), marks=[pytest.mark.exhaustive]),
        *(slow(stage, marks=[pytest.mark.exhaustive]) for stage in (calibrate, kit, validate, golden)),
        slow(engine, note),
    ],
    ids=lambda stages: "+".join(stage.__name__ for stage in stages) or "none",
)
def test_killed_anywhere_or_without_power(
    tmp_path: Path, shard: Path, stages: Sequence[Stage], before: Sequence[Stage]
) -> None:
    change = changed(tmp_path, shard, stages, before)
    recording, last = change.recorded(), len(stages)
    found = [change.check(state) for state in recording.killed]
    # From one moment on, and before its end, it is the new one.
    assert found == sorted(found) and not found[0] and found[-2] == last
    assert {change.check(state) for state in recording.without_power} == set(range(last + 1))
    assert change.check(recording.afterwards) == last, "a command that has ended has nothing left to lose"


def test_a_kill_leaves_what_was_recorded(tmp_path: Path, shard: Path) -> None:
    change = changed(tmp_path, shard, (export,), STAGES)
    states = change.recorded().killed
    for point in (*range(0, len(states) - 1, 8), len(states) - 2):
        folder = Path(shutil.copytree(change.old, tmp_path / f"killed {point}"))
        assert killed_at(partial(change.run, folder), point)
        found = {name: (folder / name).read_bytes() for name in files_of(folder) if (folder / name).is_file()}
        recorded = {name: content for name, content, _ in states[point].files}
        assert found.keys() == recorded.keys()
        # They say which process has the lock, and how long the work took.
        others = {Path(name).name for name in found if found[name] != recorded[name]}
        assert others <= {".holder.partial", MANIFEST}


@pytest.mark.parametrize(
    ("left_out", "stages"),
    [("sync_tree", (export,)), ("sync", (engine, note)), ("_sync_parents", (engine, note))],
)
def test_without_any_of_the_syncs_power_breaks_it(
    tmp_path: Path, shard: Path, monkeypatch: pytest.MonkeyPatch, left_out: str, stages: Sequence[Stage]
) -> None:
    change = changed(tmp_path, shard, stages, STAGES)
    monkeypatch.setattr(replacement, left_out, lambda *_: None)
    states = change.recorded().without_power
    with pytest.raises((AssertionError, CapaError)):
        deque(map(change.check, states), maxlen=0)
