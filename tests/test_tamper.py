"""One bit flipped in any file of a bundle: every command that reads the file refuses it by name."""

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from capa_export.base.errors import CapaError, ExitCode
from capa_export.bundle.store import MANIFEST, PARITY, REPORT, Bundle
from capa_export.calibrate.sums import CALIBRATION
from capa_export.cli import main
from capa_export.config.recipe import Recipe, load_recipe
from tests.building import Building
from tests.conftest import noise
from tests.fake_tensorrt import GRAPHS, FakeTensorRT
from tests.recorded import record

UNREAD = {"llm-prefill.rtx.log": "the log of a build that failed: for people, no command reads it"}
"""Files of the bundle below that nothing holds against a digest, and why."""
OFFSETS = 6


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    """The shipped one, made small; random weights are linear nowhere near 0.96."""
    data = load_recipe("qwen25vl").model_dump()
    data["prune"] = {"schedule": [{"layer": 2, "ratio": 0.75}]}
    data["ffn"] = {"eta": 0.5, "budget": 100}
    return Recipe(**data)


@pytest.fixture(scope="module")
def built(recipe: Recipe, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibrated and exported for real; engines, golden samples and reports stand-ins, since they are not got to."""
    folder = tmp_path_factory.mktemp("tamper")
    (folder / "pictures").mkdir()
    noise(140, 196).save(folder / "pictures/0.png")
    bundle = Bundle(folder / "bundle")
    building = Building.of(recipe, bundle, checkpoint, images=folder / "pictures")
    building.calibrate()
    building.export()
    content = np.random.default_rng(0)
    stages = {
        "engine/rtx": [f"engines/rtx/{name}.{end}" for name in GRAPHS.values() for end in ("engine", "log")],
        "golden": ["golden/records.json", "golden/0.safetensors"],
        "validate": [PARITY, REPORT],
    }
    for files in stages.values():
        for file in files:
            (bundle.folder / file).parent.mkdir(parents=True, exist_ok=True)
            (bundle.folder / file).write_bytes(content.bytes(999))
    engines = {name: {"onnx": onnx, "runtime": FakeTensorRT.__version__} for name, onnx in GRAPHS.items()}
    result = {
        "runtime": "tensorrt-rtx",
        "compute_capabilities": ["8.6", "8.9"],
        "plugins": {"kind": "none", "library_sha256": None},
        "weights": "embedded",
        "engines": engines,
    }
    cost = {"seconds": 0.0, "peak_memory_bytes": 0}
    for name, files in stages.items():
        record(bundle.folder, name, files, **cost, result=result if name == "engine/rtx" else {})
    for file in UNREAD:
        (bundle.folder / file).write_text("it said nothing")
    return bundle.folder


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The one line in which a command refuses."""

    def refuse(*command: object) -> str:
        capsys.readouterr()
        assert main([str(word) for word in command]) == ExitCode.PREFLIGHT
        [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        return line

    return refuse


@contextmanager
def flipped(path: Path, offset: int, bit: int) -> Iterator[None]:
    data = path.read_bytes()
    path.write_bytes(data[:offset] + bytes([data[offset] ^ 1 << bit]) + data[offset + 1 :])
    try:
        yield
    finally:
        path.write_bytes(data)


def flips(path: Path) -> list[tuple[int, int]]:
    """Offset and bit: in the first, the last and the middle byte, and in others."""
    size, chosen = path.stat().st_size, np.random.default_rng(list(path.name.encode()))
    offsets = {0, size - 1, size // 2, *chosen.integers(size, size=OFFSETS - 3).tolist()}
    return [(offset, int(chosen.integers(8))) for offset in sorted(offsets)]


def files_of(bundle: Path) -> set[str]:
    return {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}


def readers(bundle: Path, file: str, pictures: Path) -> list[tuple[object, ...]]:
    """Commands that read a file of the bundle."""
    run = ("run", bundle, "--prompt", "what ?", "--image", pictures / "0.png")
    validate = ("validate", bundle, "--images", pictures)
    commands: list[tuple[object, ...]] = [("inspect", bundle)]
    if file == MANIFEST:
        commands += [run, validate, ("engine", bundle), ("doctor", bundle)]
    elif file.startswith("onnx/"):
        commands += [run, validate, ("engine", bundle, "--plugins", "none")]
        if not file.endswith((".data", ".safetensors")):
            commands += [("doctor", bundle), ("engine", bundle, "--target", "orin", "--plugins", "none")]
    elif file.startswith("engines/"):
        commands += [(*run, "--engine", "rtx"), (*validate, "--engine", "rtx")]
    elif file == CALIBRATION:
        commands += [validate]
    return commands


def test_what_is_not_tampered_with_is_taken(built: Path) -> None:
    bundle = Bundle.open(built)
    stages = bundle.manifest["stages"]
    bundle.verify(*stages)
    assert files_of(built) == {MANIFEST, *UNREAD, *(file for record in stages.values() for file in record["files"])}
    assert main(["inspect", str(built)]) == ExitCode.OK


def test_every_flip_is_seen(built: Path) -> None:
    stages = Bundle.open(built).manifest["stages"]
    owner = {file: name for name, record in stages.items() for file in record["files"]} | {MANIFEST: "export"}
    for file in sorted(files_of(built) - UNREAD.keys()):
        for offset, bit in flips(built / file):
            with flipped(built / file, offset, bit), pytest.raises(CapaError, match=re.escape(str(built / file))):
                Bundle.open(built).verify(owner[file])


def test_tampered_files_are_refused_by_every_reader(
    built: Path, refusal: Callable[..., str], trt: FakeTensorRT
) -> None:
    pictures = built.parent / "pictures"
    for file in sorted(files_of(built) - UNREAD.keys()):
        with flipped(built / file, *flips(built / file)[-2]):
            for command in readers(built, file, pictures):
                assert str(built / file) in refusal(*command), (command, file)


def test_a_tampered_manifest_is_refused_at_every_byte(built: Path) -> None:
    from capa_export.bundle.manifest import parse_manifest

    data = (built / MANIFEST).read_bytes()
    parse_manifest(data)
    chosen = np.random.default_rng(1)
    for offset in (*range(0, len(data), 97), *range(len(data) - 99, len(data))):
        changed = bytes([data[offset] ^ int(chosen.integers(1, 256))])
        for tampered in (
            data[:offset] + changed + data[offset + 1 :],
            data[:offset] + data[offset + 1 :],
            data[:offset],
        ):
            with pytest.raises((ValueError, RecursionError)):
                parse_manifest(tampered)


def test_space_that_no_value_depends_on_counts(built: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(built, tmp_path / "copy"))
    path = copy / MANIFEST
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    with pytest.raises(CapaError, match="its digest differs"):
        Bundle.open(copy)


def test_a_tampered_file_that_is_missing(built: Path, tmp_path: Path, refusal: Callable[..., str]) -> None:
    copy = Path(shutil.copytree(built, tmp_path / "copy"))
    (copy / "onnx/llm/decode.onnx").unlink()
    assert "onnx/llm/decode.onnx: missing or changed" in refusal("run", copy, "--prompt", "what ?")
