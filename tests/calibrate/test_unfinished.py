"""A calibration that is killed goes on where it was, and measures what one that was not killed measures."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from capa_export.base.errors import CapaError, ExitCode, NotFiniteError
from capa_export.bundle.store import MANIFEST, Bundle
from capa_export.calibrate.measure import Measurement
from capa_export.calibrate.scaled_sets import EFFECT
from capa_export.calibrate.sums import CALIBRATION, Calibration
from capa_export.cli import main
from tests.calibrate.killing import killed
from tests.conftest import noise

SAMPLES, LAYERS = 4, 5
PARTS = {"--in-memory": 1, "--layer-by-layer": 1 + LAYERS + 1}
"""Steps a sample: the whole model; or a look at it, every layer, and the last norm."""

Calibrate = Callable[..., list[str]]


@pytest.fixture(scope="module")
def calibrate(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Calibrate:
    """The command line of a calibration on pictures of different sizes."""
    pictures = tmp_path_factory.mktemp("pictures")
    for index in range(SAMPLES):
        noise(56 + 28 * index, 84, seed=index).save(pictures / f"{index}.png")

    def command(out: Path, *options: str) -> list[str]:
        where = ["--checkpoint", str(checkpoint), "--images", str(pictures), "--out", str(out)]
        return ["calibrate", "--model", "qwen25vl", *where, *options]

    return command


@pytest.mark.parametrize(("option", "kills"), [("--in-memory", (3,)), ("--layer-by-layer", (2, 9, 14))])
def test_nothing_is_measured_twice(calibrate: Calibrate, tmp_path: Path, option: str, kills: tuple[int, ...]) -> None:
    command = calibrate(tmp_path / "killed", option)
    for steps in kills:
        assert killed(command, steps) == (-signal.SIGKILL, 0)
    assert killed(command, 1000) == (0, PARTS[option] * SAMPLES - sum(kills))
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == [CALIBRATION, MANIFEST, EFFECT]
    assert main(calibrate(tmp_path / "whole", option)) == ExitCode.OK
    assert Calibration.load(tmp_path / "killed").digest() == Calibration.load(tmp_path / "whole").digest()


def test_another_input_starts_anew(calibrate: Calibrate, tmp_path: Path) -> None:
    assert killed(calibrate(tmp_path, "--in-memory"), 2)[0] == -signal.SIGKILL
    assert killed(calibrate(tmp_path, "--in-memory", "--samples", "3"), 1000) == (0, 3)
    assert killed(calibrate(tmp_path, "--in-memory"), 2)[0] == -signal.SIGKILL
    assert killed(calibrate(tmp_path, "--layer-by-layer"), 1000) == (0, PARTS["--layer-by-layer"] * SAMPLES)


@pytest.mark.usefixtures("forked_workers")
def test_workers_go_on_where_one_process_was(calibrate: Calibrate, tmp_path: Path) -> None:
    assert killed(calibrate(tmp_path / "out", "--in-memory"), 3)[0] == -signal.SIGKILL
    assert main(calibrate(tmp_path / "out", "--workers", "2")) == ExitCode.OK
    assert main(calibrate(tmp_path / "whole", "--in-memory")) == ExitCode.OK
    assert Calibration.load(tmp_path / "out").samples == SAMPLES
    assert Calibration.load(tmp_path / "out").digest() == Calibration.load(tmp_path / "whole").digest()


@pytest.mark.parametrize(("option", "free"), [("--in-memory", 0), ("--layer-by-layer", 1 << 60)])
def test_other_free_memory_drops_no_progress(
    calibrate: Calibrate,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    option: str,
    free: int,
) -> None:
    assert killed(calibrate(tmp_path / "out", option), 3)[0] == -signal.SIGKILL
    monkeypatch.setattr("capa_export.model.memory.available_memory", lambda: free)
    assert main(calibrate(tmp_path / "out")) == ExitCode.OK
    assert f"goes on where it was interrupted, as with {option}" in capsys.readouterr().err
    assert main(calibrate(tmp_path / "whole", option)) == ExitCode.OK
    assert Calibration.load(tmp_path / "out").digest() == Calibration.load(tmp_path / "whole").digest()


def test_a_mode_in_which_nothing_was_measured_is_not_taken_again(
    calibrate: Calibrate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert killed(calibrate(tmp_path, "--in-memory"), 0)[0] == -signal.SIGKILL
    monkeypatch.setattr("capa_export.model.memory.available_memory", lambda: 0)
    assert main(calibrate(tmp_path)) == ExitCode.OK
    said = capsys.readouterr().err
    assert "layer by layer: the model takes" in said and "goes on" not in said


def test_what_can_pass_keeps_what_was_measured(
    calibrate: Calibrate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    add, steps = Measurement.add, iter(range(SAMPLES))

    def failing(*arguments: Any) -> None:
        if next(steps) == 2:
            raise CapaError("cannot read tensor: the share is gone")
        add(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Measurement, "add", failing)
        assert main(calibrate(tmp_path, "--in-memory")) == ExitCode.PREFLIGHT
    assert killed(calibrate(tmp_path, "--in-memory"), 1000) == (0, SAMPLES - 2)


def test_what_is_worthless_leaves_nothing(tmp_path: Path) -> None:
    bundle = Bundle(tmp_path)

    def fail(error: Exception, *, measured: bool = True) -> None:
        with bundle.unfinished("calibrate", 1) as folder:
            if measured:
                (folder / "states").write_text("")
            raise error

    for error in (CapaError("the disk is full", ExitCode.EXPORT), CapaError("a worker was killed"), OSError("gone")):
        with pytest.raises(type(error), match=str(error)):
            fail(error)
        with bundle.unfinished("calibrate", 1) as folder:
            assert (folder / "states").exists()
    with bundle.unfinished("calibrate", 2) as folder:
        assert not (folder / "states").exists()
    with pytest.raises(NotFiniteError, match="no numbers"):
        fail(NotFiniteError("no numbers"))
    assert not list(tmp_path.iterdir())
    with pytest.raises(CapaError, match="the disk is too small"):
        fail(CapaError("the disk is too small"), measured=False)
    assert not list(tmp_path.iterdir())
