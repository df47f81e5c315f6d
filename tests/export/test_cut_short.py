"""An export over an older one, cut short anywhere, of a model's real files."""

import pickle
import shutil
from functools import partial
from pathlib import Path

import pytest

from capa_export.bundle.store import Bundle
from capa_export.cli import main
from tests.bundle.test_cut_short import files_of, seen
from tests.cut_short import Recording, recorded
from tests.forked import FORKED


def record(arguments: list[str], folder: Path, file: Path) -> None:
    recorded(partial(main, arguments), folder, file)


@pytest.mark.slow
@pytest.mark.parametrize("weights", [["--precision", "fp16"], ["--precision", "fp32", "--weights", "in-place"]])
def test_an_export_over_an_older_one(checkpoint: Path, tmp_path: Path, weights: list[str]) -> None:
    source = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    options = ["--model", "qwen25vl", "--checkpoint", str(source), *weights]

    def export(folder: Path, ratio: str) -> list[str]:
        return ["export", *options, "--schedule", f"capa@2:{ratio}/full", "--out", str(folder)]

    folder, new, one = tmp_path / "bundle", tmp_path / "new", tmp_path / "one"
    for ratio in ("0.5", "0.75"):
        assert main(export(new, ratio)) == 0
    assert main(export(folder, "0.5")) == 0
    before = seen(folder)
    process = FORKED.Process(target=record, args=(export(folder, "0.75"), folder, tmp_path / "recording"))
    process.start()
    process.join()
    assert process.exitcode == 0
    after = seen(folder)
    recording: Recording = pickle.loads((tmp_path / "recording").read_bytes())  # noqa: S301 - the test's own.
    states, found = [*dict.fromkeys(recording.killed)], list[bool]()
    for state in states:
        state.write(one)
        now = seen(one)
        assert now in (before, after)
        found.append(now == after)
        shutil.rmtree(one)
    assert found == sorted(found) and not found[0] and found[-1]
    for state in recording.without_power:
        state.write(one)
        assert seen(one) in (before, after)
        shutil.rmtree(one)
    # The last before the new one counts, which has the most to remove; and the first after.
    for state in (states[found.index(True) - 1], states[found.index(True)]):
        state.write(one)
        assert main(export(one, "0.75")) == 0
        assert files_of(one) == files_of(new)
        Bundle.open(one).verify("export")
        shutil.rmtree(one)
