"""The golden for Polygraphy: its own commands, as the README says them, read the files and find what they should."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from capa_export.api import stages
from capa_export.base.errors import CapaError, ExitCode
from capa_export.bundle.store import Bundle
from capa_export.config.target import load_target
from capa_export.trt.kit import write_kit
from capa_export.trt.polygraphy import POLYGRAPHY
from tests.fake_driver import has_driver

NAMES = ("visual", "prefill", "decode")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Of the shipped checkpoint, whose weights are large enough to be inputs."""
    folder = tmp_path_factory.mktemp("bundle") / "out"
    stages.export(recipe="tiny-qwen25vl", out=folder, schedule="capa@2:0.75/full", polygraphy=True)
    return Bundle(folder)


@pytest.fixture(scope="module")
def kit(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With weights as inputs; far from the bundle, as on a device."""
    folder = tmp_path_factory.mktemp("kit")
    write_kit(bundle, load_target("orin"), folder / "made", plugins="none", weights="external")
    return Path(shutil.copytree(folder / "made", folder / "copied"))


Polygraphy = Callable[[str, Path], tuple[int, str]]


@pytest.fixture
def polygraphy(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Polygraphy:
    """Runs a command of Polygraphy in a folder, in this process, which has imported torch already."""
    from polygraphy import tools

    def run(line: str, folder: Path) -> tuple[int, str]:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", shlex.split(line))
        capfd.readouterr()
        code = tools.main()
        return code, "".join(capfd.readouterr())

    return run


def command(readme: Path, *words: str) -> str:
    """The one command of a README that has all of these words."""
    lines = [line.strip() for line in readme.read_text(encoding="utf-8").splitlines() if line.startswith("    ")]
    (found,) = [line for line in lines if all(word in line for word in words)]
    return found


@pytest.fixture
def readme(bundle: Bundle) -> Path:
    return bundle.folder / POLYGRAPHY / "README.md"


@pytest.mark.parametrize("name", NAMES)
def test_its_runner_of_onnx_runtime_finds_the_golden(
    polygraphy: Polygraphy, bundle: Bundle, readme: Path, name: str
) -> None:
    code, said = polygraphy(command(readme, "--onnxrt --load", f"{name}.inputs.json", "--load-outputs"), bundle.folder)
    assert code == 0, said
    assert "Passed: 1/1" in said
    # Caches and kept positions too.
    outputs = json.loads((readme.parent / f"{name}.outputs.json").read_text(encoding="utf-8"))["lst"][0][1][0][
        "outputs"
    ]
    assert outputs.keys() >= ({"image_features"} if name == "visual" else {"logits", "present.3.key"})
    assert all(re.search(rf"(?m){re.escape(output)}.*", said) for output in outputs)


def test_it_finds_what_is_not_the_golden(polygraphy: Polygraphy, bundle: Bundle, readme: Path, tmp_path: Path) -> None:
    """Of the patches in another order."""
    from polygraphy.json import load_json, save_json

    (inputs,) = load_json(str(readme.parent / "visual.inputs.json"))
    wrong = {name: np.roll(array, 1, axis=1) for name, array in inputs.items()}
    save_json([wrong], str(tmp_path / "wrong.json"))
    line = command(readme, "--onnxrt --load", "visual.inputs.json", "--load-outputs")
    code, said = polygraphy(
        line.replace(f"{POLYGRAPHY}/visual.inputs.json", str(tmp_path / "wrong.json")), bundle.folder
    )
    assert code != 0, said
    assert "FAILED" in said


@pytest.mark.parametrize("name", NAMES)
def test_inspect_shows_graphs_and_values(polygraphy: Polygraphy, bundle: Bundle, readme: Path, name: str) -> None:
    code, said = polygraphy(command(readme, "inspect data", f"{name}.outputs.json"), bundle.folder)
    assert code == 0 and "golden (1 iterations)" in said
    if name == "prefill":
        code, said = polygraphy(command(readme, "inspect model", "prefill.onnx"), bundle.folder)
        assert code == 0, said
        assert "num_keep [dtype=int64" in said and "capa" in said


@pytest.mark.trt
@pytest.mark.parametrize("name", NAMES)
def test_its_mode_for_tensorrt_rtx_builds(bundle: Bundle, readme: Path, tmp_path: Path, name: str) -> None:
    """In a shell, for the golden's shapes. Without a GPU it ends where the engine is to be loaded."""
    script = tmp_path / "polygraphy"
    start = "from polygraphy.tools import main; raise SystemExit(main())"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{start}" "$@"\n', encoding="utf-8")
    script.chmod(0o755)
    paths = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    run = subprocess.run(
        ["/bin/sh", "-c", command(readme, "polygraphy run", "--trt", f"{name}.inputs.json", "--load-outputs")],
        cwd=bundle.folder,
        env={**os.environ, "PATH": paths, "POLYGRAPHY_USE_TENSORRT_RTX": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    said = run.stdout + run.stderr
    assert "Finished engine building" in said, said
    assert "No shapes provided" not in said and "No values provided" not in said
    if name == "prefill":
        assert "num_keep [min=[16], opt=[16], max=[16]]" in said
    if has_driver():
        assert run.returncode == 0, said
    else:
        assert "cudaError 35" in said and "Could not deserialize engine" in said


def test_reduce_takes_a_graph_apart(polygraphy: Polygraphy, bundle: Bundle, readme: Path, tmp_path: Path) -> None:
    """The graph of vision, of which a check that always fails leaves a node or two."""
    line = command(readme, "debug reduce", "visual.inputs.json").partition(" --check ")[0]
    folder = shutil.copytree(bundle.folder, tmp_path / "copy")
    code, said = polygraphy(f"{line} --check false", folder)
    assert code == 0, said
    assert "Minimum Bad Model" in said
    assert (folder / "visual.reduced.onnx").stat().st_size < (folder / "onnx/visual/model.onnx").stat().st_size / 2


def test_a_kit_has_its_own_limits(kit: Path) -> None:
    shapes = (kit / "golden" / POLYGRAPHY / "prefill.shapes").read_text(encoding="utf-8")
    spec = json.loads((kit / "kit.json").read_text(encoding="utf-8"))
    _, _, largest = spec["engines"]["llm/prefill"]["profiles"]["llm/prefill.onnx"]["shapes"]["inputs_embeds"]
    assert f"inputs_embeds:{json.dumps(largest, separators=(',', ':'))}" in shapes.partition("--trt-max-shapes")[2]
    assert "num_keep:[3136]" in shapes
    assert f"golden/{POLYGRAPHY}/kit_inputs.py" in spec["files"]
    line = command(kit / "golden" / POLYGRAPHY / "README.md", "prefill.engine", "--trt")
    assert line.startswith("polygraphy run llm/prefill.engine --model-type engine --trt --allocation-strategy runtime ")


def test_weights_that_are_inputs_come_from_the_kit(polygraphy: Polygraphy, kit: Path) -> None:
    """ONNX Runtime computes the golden with the lowered graph, whose weights are inputs."""
    line = command(kit / "golden" / POLYGRAPHY / "README.md", "--onnxrt --data-loader", "prefill.outputs.json")
    assert "kit_inputs.py:prefill" in line
    code, said = polygraphy(line, kit)
    assert code == 0, said
    assert "Passed: 1/1" in said


def test_bf16_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(CapaError, match="NumPy's arrays, which have no bf16") as error:
        stages.export("no/checkpoint", out=tmp_path / "out", precision="bf16", polygraphy=True)
    assert error.value.code is ExitCode.USAGE
    assert not (tmp_path / "out").exists()


def test_a_kit_of_bf16_says_why_it_has_none(tmp_path: Path) -> None:
    stages.export(recipe="tiny-qwen25vl", out=tmp_path / "out", schedule="capa@2:0.75/full", precision="bf16")
    write_kit(Bundle(tmp_path / "out"), load_target("orin"), tmp_path / "kit", plugins="none")
    assert [path.name for path in sorted((tmp_path / "kit" / "golden").iterdir())] == [
        "golden.json",
        "golden.safetensors",
    ]
    assert "Polygraphy takes none of\nthem: its arrays are NumPy's" in (tmp_path / "kit" / "README.md").read_text()


def test_the_files_are_a_stage_of_the_bundle(bundle: Bundle) -> None:
    stage = bundle.stage(POLYGRAPHY)
    assert {
        f"{POLYGRAPHY}/{name}.{kind}" for name in NAMES for kind in ("inputs.json", "outputs.json", "shapes")
    } <= set(stage["files"])
    bundle.verify(POLYGRAPHY)


def test_they_go_with_the_graphs_that_they_are_of(bundle: Bundle, tmp_path: Path) -> None:
    other = Bundle(Path(shutil.copytree(bundle.folder, tmp_path / "bundle")))
    stages.export(recipe="tiny-qwen25vl", out=other.folder, schedule="capa@2:0.75/full", precision="fp32")
    assert POLYGRAPHY not in other.manifest["stages"] and not (other.folder / POLYGRAPHY).exists()
