"""The engine stage: what a bundle gets for a target, with and without plugins, and what is refused beforehand."""

import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from capa_export.base import code
from capa_export.base.errors import CapaError
from capa_export.base.progress import silent
from capa_export.bundle.store import Bundle
from capa_export.cli import main
from capa_export.config.pixels import PixelBounds
from capa_export.config.target import DimRange, Target, load_target
from capa_export.run.bundled import bundled_bounds, bundled_prompter
from capa_export.trt import kit
from capa_export.trt.stage import build_engines
from tests.targets import one_gpu


@pytest.fixture(scope="module")
def rtx() -> Target:
    """For one GPU, which builds faster."""
    return one_gpu()


@pytest.mark.trt
def test_the_nodes_become_plugins_and_the_manifest_says_so(bundle: Bundle, rtx: Target) -> None:
    plain = build_engines(bundle, rtx, weights="embedded", report=silent, plugins="none")
    assert plain["plugins"] == {"kind": "none", "library_sha256": None}
    assert [engine["custom_layers"] for engine in plain["engines"].values()] == [0, 0, 0]
    made = build_engines(bundle, rtx, weights="embedded", report=silent, plugins="python")
    assert made["plugins"]["kind"] == "python"
    assert made["engines"]["llm/prefill"]["custom_layers"] == 3, "score, keep and gather"
    assert made["engines"]["llm/prefill"]["layers"] < plain["engines"]["llm/prefill"]["layers"]
    assert made["engines"]["llm/decode"]["custom_layers"] == 0
    assert bundle.stage("engine/rtx")["result"] == made
    folder = bundle.folder / "engines" / "rtx"
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == {f"{name}.{kind}" for name in made["engines"] for kind in ("engine", "layers.json", "log")}


def test_a_failed_build_leaves_its_log_alone(
    bundle: Bundle, rtx: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Bundle(shutil.copytree(bundle.folder, tmp_path / "bundle"))
    before = set(copy.folder.rglob("*"))
    (tmp_path / "tensorrt_rtx.py").write_text("raise RuntimeError('surprise')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH")))))
    with pytest.raises(CapaError, match=r"ended with status 1: RuntimeError: surprise; log: ") as caught:
        build_engines(copy, rtx, weights="external", report=silent, plugins="none")
    log = copy.folder / "visual-visual.rtx.log"
    assert str(caught.value).startswith(f"{copy.folder / 'onnx/visual/model.onnx'}: ")
    assert str(caught.value).endswith(f"; log: {log}")
    assert set(copy.folder.rglob("*")) - before == {log}
    assert "surprise" in log.read_text(encoding="utf-8")


def test_a_device_gets_a_kit(
    bundle: Bundle, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["engine", str(bundle.folder), "--target", "orin", "--plugins", "none", "--json"]) == 0
    output = capsys.readouterr()
    assert json.loads(output.out)["kit"] == "engines/orin"
    folder = bundle.folder / "engines/orin"
    assert (folder / "build.sh").exists()
    bundle.verify("engine/orin")
    assert main(["engine", str(bundle.folder), "--target", "orin", "--plugins", "none"]) == 0
    output = capsys.readouterr()
    assert "engine/orin   up to date" in output.err
    assert output.out == "kit: engines/orin in the bundle; copy that folder to the device and run its build.sh there\n"
    with monkeypatch.context() as patch:
        patch.setattr(code, "digest_code", lambda *names: f"other {names}")
        assert main(["engine", str(bundle.folder), "--target", "orin", "--plugins", "none"]) == 0
        assert "up to date" not in capsys.readouterr().err
    # This machine is no Jetson.
    assert main(["engine", str(folder), "--on-device"]) == 5
    output = capsys.readouterr()
    [line] = [line for line in output.err.splitlines() if line.startswith("error")]
    assert "the kit is for orin" in line or "run this on the device" in line


def test_pictures_are_as_large_as_the_engines_take(bundle: Bundle, tmp_path: Path) -> None:
    """Whichever target the bundle was exported for, and with a target of the user's own, too."""
    copy = Bundle(shutil.copytree(bundle.folder, tmp_path / "bundle"))
    limits = {"max_rows": 64, "max_cols": 64, "max_tiles": 16}
    copy.update(recipe={**copy.manifest["recipe"], "pictures": limits})
    thor = load_target("thor")
    narrow = {**thor.require_engine().dims, "rows": DimRange(min=1, opt=3, max=5)}
    engine = thor.require_engine().model_copy(update={"dims": narrow})
    for target in (load_target("orin"), thor.model_copy(update={"name": "mine", "engine": engine})):
        build_engines(copy, target, weights="embedded", report=silent, plugins="none")
    assert bundled_bounds(copy, None, None) == PixelBounds(**limits)
    assert bundled_bounds(copy, None, None, engine="orin") == PixelBounds(max_rows=56, max_cols=56, max_tiles=16)
    mine = bundled_bounds(copy, None, 90_000, engine="mine")
    assert (mine.max_pixels, mine.max_rows) == (90_000, 5)
    [picture] = bundled_prompter(copy, bounds=mine)("what ?", [Image.new("RGB", (300, 900))]).pictures
    assert picture.grid is not None and picture.grid[0] == 5
    with pytest.raises(CapaError, match="stage 'engine/other' has not run"):
        bundled_bounds(copy, None, None, engine="other")


def test_a_library_that_the_device_could_not_load(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spark = load_target("spark")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    with pytest.raises(CapaError, match=r"spark is aarch64 and this machine x86_64: .*; build on spark, or with"):
        build_engines(bundle, spark, weights="embedded", report=silent, plugin_library=tmp_path / "any.so")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "orin", "--plugins", "python"], "a device builds with native plugins, or none"),
        (["--target", "orin", "--plugin-library", "FILE"], "orin compiles its own"),
        (["--plugins", "native"], "--plugins native needs --plugin-library FILE"),
        (["--plugins", "none", "--plugin-library", "FILE"], "exclude each other"),
        (["--tensorrt-include", "FILE"], "--tensorrt-include is for --on-device"),
        (["--on-device", "--weights", "external"], "the kit says target, weights and plugins"),
    ],
)
def test_options_that_cannot_hold_are_refused(
    bundle: Bundle, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = bundle.folder / "capa_manifest.json"
    words = [str(file) if word == "FILE" else word for word in options]
    assert main(["engine", str(bundle.folder), *words]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_build_refuses_plugins_before_it_reads_a_weight(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["build", "--model", "tiny-qwen25vl", "--out", str(tmp_path / "out"), "--plugins", "native"]
    assert main(command) == 2
    assert "needs --plugin-library" in capsys.readouterr().err
    assert main([*command, "--target", "onnx"]) == 2
    assert "target onnx has no engine to put them in" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_golden_that_memory_cannot_compute_is_left_out(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kit, "available_memory", lambda: 1000)
    kit.write_kit(bundle, load_target("orin"), tmp_path / "kit", plugins="none")
    assert "no golden: running the graphs takes" in capsys.readouterr().err
    assert not (tmp_path / "kit/golden").exists()
    assert "## The golden" not in (tmp_path / "kit/README.md").read_text()


def test_limits_that_a_graph_needs_and_a_target_lacks(bundle: Bundle, rtx: Target) -> None:
    engine = rtx.require_engine().model_copy(update={"dims": {"sequence": DimRange(min=1, opt=1, max=2)}})
    with pytest.raises(CapaError, match="target rtx: no limits for dimension"):
        build_engines(
            bundle, rtx.model_copy(update={"engine": engine}), weights="embedded", report=silent, plugins="none"
        )
