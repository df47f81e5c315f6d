"""Kits: what is in them, that they build with nothing but a runtime, and that they refuse every wrong place."""

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from safetensors.numpy import load_file

from capa_export.base.errors import CapaError, ExitCode
from capa_export.bundle.store import Bundle, digest_of, file_digest
from capa_export.config.recipe import load_recipe
from capa_export.config.target import Target, load_target
from capa_export.trt import builder as kit_builder
from capa_export.trt.kit import write_kit
from capa_export.trt.kit_file import KIT
from capa_export.trt.layers import cache_copies, parse_layers, weight_copies
from capa_export.trt.stage import build_kit
from tests.building import Building
from tests.headers import headers_of_tensorrt
from tests.products import once_each

ENGINES = ("visual/visual", "llm/prefill", "llm/decode")


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """FP16, not calibrated."""
    made = Bundle(tmp_path_factory.mktemp("bundle") / "out")
    Building.of(load_recipe("tiny-qwen25vl"), made, checkpoint, ffn=False).export()
    return made


@pytest.fixture(scope="module")
def orin() -> Target:
    """With less room, which builds faster."""
    target = load_target("orin")
    engine = target.require_engine()
    small = engine.dims["sequence"].model_copy(update={"max": 1536})
    return target.model_copy(update={"engine": engine.model_copy(update={"dims": {**engine.dims, "sequence": small}})})


@pytest.fixture(scope="module")
def kit(bundle: Bundle, orin: Target) -> Path:
    """Without plugins. Tests copy it before they change it."""
    folder = bundle.folder / "engines" / "orin"
    write_kit(bundle, orin, folder, plugins="none")
    return folder


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Of the shipped checkpoint: heads for which there are kernels, and weights large enough to be inputs."""
    recipe, made = load_recipe("tiny-qwen25vl"), Bundle(tmp_path_factory.mktemp("wide") / "out")
    Building.of(recipe, made, recipe.checkpoint, ffn=False).export()
    return made


@pytest.fixture
def spare(kit: Path, tmp_path: Path) -> Path:
    return shutil.copytree(kit, tmp_path / "kit")


def described(kit: Path) -> dict[str, Any]:
    return json.loads((kit / KIT).read_text(encoding="utf-8"))


def describe(kit: Path, spec: dict[str, Any]) -> None:
    """Make a kit say something else, and say that this is what was made."""
    kept = {name: value for name, value in spec.items() if name != "digest"}
    (kit / KIT).write_text(json.dumps({**kept, "digest": digest_of(kept)}), encoding="utf-8")


def test_a_kit_lists_all_that_is_in_it(kit: Path) -> None:
    spec = described(kit)
    files = {path.relative_to(kit).as_posix() for path in kit.rglob("*") if path.is_file()}
    assert files == {KIT, *spec["files"]}
    assert {name: file_digest(kit / name) for name in spec["files"]} == spec["files"]
    assert files >= {"README.md", "build.sh", "builder.py", "engine_worker.py", "onnx/llm/model.onnx.data"}
    assert os.access(kit / "build.sh", os.X_OK)
    assert spec["engines"].keys() == set(ENGINES)
    assert (spec["target"], spec["compute_capabilities"], spec["cpu"]) == ("orin", ["8.7"], "aarch64")
    assert (spec["plugins"], spec["precision"], spec["weights"]) == ("none", "fp16", "embedded")
    assert spec["engines"]["llm/prefill"]["profiles"]["llm/prefill.onnx"]["shape_inputs"] == {
        "num_keep": [[0], [256], [3136]]
    }
    assert spec["engines"]["llm/decode"]["profiles"]["llm/decode.onnx"]["shapes"]["inputs_embeds"] == [[1, 1, 64]] * 3


def test_weights_are_not_copied(bundle: Bundle, kit: Path) -> None:
    for name in ("llm", "visual"):
        data = f"{name}/model.onnx.data"
        assert (bundle.folder / "onnx" / data).samefile(kit / "onnx" / data)


def test_a_disk_without_links_gets_a_copy(
    bundle: Bundle, orin: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError

    monkeypatch.setattr(os, "link", refuse)
    write_kit(bundle, orin, tmp_path / "kit", plugins="none")
    data = tmp_path / "kit" / "onnx" / "llm" / "model.onnx.data"
    assert data.stat().st_nlink == 1
    assert data.read_bytes() == (bundle.folder / "onnx" / "llm" / "model.onnx.data").read_bytes()


def test_older_tensorrt_has_graphs_without_functions(kit: Path) -> None:
    engines = described(kit)["engines"]
    assert engines.keys() == set(ENGINES)
    for name, engine in engines.items():
        newer, older = (onnx.load(kit / engine[which], load_external_data=False) for which in ("onnx", "lowered"))
        assert ("Attention" in {node.op_type for node in newer.graph.node}) is (name != "llm/decode")
        assert not {"Attention", "RotaryEmbedding", "RMSNormalization", "CumSum"} & {
            node.op_type for node in older.graph.node
        }
        assert not older.functions
        assert {node.domain for node in older.graph.node} == {""}
        assert [version.version for version in older.opset_import if not version.domain] == [20]


@pytest.mark.slow
def test_graphs_for_plugins_keep_the_nodes(wide: Bundle, orin: Target, tmp_path: Path) -> None:
    pytest.importorskip("cuda.bindings.nvfatbin", reason="needs the extra rtx")
    write_kit(wide, orin, tmp_path / "kit", plugins="native", weights="external")
    spec = described(tmp_path / "kit")
    prefill = spec["engines"]["llm/prefill"]
    assert prefill["plugins"] == 3
    for which, has_functions in (("onnx", True), ("lowered", False)):
        model = onnx.load(tmp_path / "kit" / prefill[which], load_external_data=False)
        assert sum(node.domain == "capa" for node in model.graph.node) == 3
        assert bool(model.functions) is has_functions
    entries = json.loads((tmp_path / "kit" / "llm" / "prefill.weights.json").read_text())
    assert {entry["file"] for entry in entries.values()} == {"../onnx/llm/model.onnx.data"}
    assert {"plugins/build.sh", "plugins/capa_plugin.cpp", "plugins/capa_kernels.s"} <= spec["files"].keys()


def test_the_golden_is_what_the_graphs_compute(bundle: Bundle, kit: Path) -> None:
    tensors = load_file(kit / "golden" / "golden.safetensors")
    runs = json.loads((kit / "golden" / "golden.json").read_text())["runs"]
    assert [run["onnx"] for run in runs] == ["visual/model.onnx", "llm/prefill.onnx", *["llm/decode.onnx"] * 2]

    # Another run of the graphs, from what the golden says went in.
    def given(index: int) -> dict[str, np.ndarray]:
        return {name: tensors[key] for name, key in runs[index]["inputs"].items()}

    past: dict[str, np.ndarray] = {}
    for index, run in enumerate(runs):
        session = onnxruntime.InferenceSession(bundle.folder / "onnx" / run["onnx"], providers=["CPUExecutionProvider"])
        names = [entry.name for entry in session.get_outputs()]
        result = dict(zip(names, session.run(names, {**given(index), **past}), strict=True))
        for name, key in run["outputs"].items():
            np.testing.assert_array_equal(result[name], tensors[key])
        past = {f"past_key_values.{name.removeprefix('present.')}": result[name] for name in names if "present" in name}
    assert tensors["1.kept_positions.0"].shape == (len(tensors["1.text_positions"]) + 16,)
    assert runs[2]["inputs"].keys() == {"inputs_embeds", "position_ids", "past_lengths"}


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("rtx", {}, "target rtx is built here: it takes no kit"),
        ("orin", {"plugins": "python"}, "a device builds with native plugins, or none"),
    ],
)
def test_what_cannot_be_a_kit(
    bundle: Bundle, tmp_path: Path, target: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(CapaError, match=message) as caught:
        write_kit(bundle, load_target(target), tmp_path / "kit", **options)
    assert caught.value.code is ExitCode.USAGE
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_of_a_kit_that_fails(
    bundle: Bundle, orin: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise CapaError("no golden")

    monkeypatch.setattr("capa_export.trt.kit.write_golden", fail)
    with pytest.raises(CapaError, match="no golden"):
        write_kit(bundle, orin, tmp_path / "kit", plugins="none")
    assert not list(tmp_path.iterdir())


# Wrong places. The kit's device is stood in for by a driver and a `tensorrt` that say what they are and do no more.

DRIVER = """
int cuInit(unsigned flags) { return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = 0; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = attribute == 75 ? MAJOR : MINOR; return 0; }
"""


class Device:
    """A machine that takes itself for the kit's device, but for what a test makes wrong."""

    def __init__(self, folder: Path, kit: Path) -> None:
        self.folder, self.kit = folder, kit
        spec = described(kit)
        spec["cpu"] = platform.machine()
        describe(kit, spec)
        self.capability("8.7")
        self.tensorrt("10.3.0")

    def capability(self, capability: str) -> None:
        (self.folder / "cuda.c").write_text(DRIVER)
        numbers = [f"-D{name}={value}" for name, value in zip(("MAJOR", "MINOR"), capability.split("."), strict=True)]
        library = self.folder / "libcuda.so.1"
        compiler = shutil.which("cc")
        assert compiler is not None
        subprocess.run([compiler, "-shared", "-fPIC", *numbers, "cuda.c", "-o", library], cwd=self.folder, check=True)

    def tensorrt(self, version: str) -> None:
        (self.folder / "tensorrt.py").write_text(f"__version__ = {version!r}\n")

    def run(self, *options: str) -> tuple[int, str]:
        variables = {"LD_LIBRARY_PATH": str(self.folder), "PYTHONPATH": str(self.folder), "PYTHON": sys.executable}
        command = [str(self.kit / "build.sh"), *options]
        run = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False)
        return run.returncode, run.stderr.splitlines()[-1]


@pytest.fixture
def device(spare: Path, tmp_path: Path) -> Device:
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler for the stand-in of the driver")
    return Device(tmp_path, spare)


def test_the_right_device_is_recognised(device: Device) -> None:
    assert device.run("--check") == (0, "this is orin, with tensorrt 10.3.0")


def test_another_gpu_is_refused(device: Device) -> None:
    device.capability("9.0")
    code, error = device.run()
    assert code == ExitCode.ENGINE == kit_builder.FAILED
    assert error.startswith("error: the GPU here has compute capability 9.0, the kit is for orin, which has 8.7:")


def test_no_driver_is_refused(device: Device) -> None:
    (device.folder / "libcuda.so.1").write_text("not a library")
    code, error = device.run()
    assert (code, error) == (5, "error: no NVIDIA driver here (libcuda.so.1): run this on the device")


@pytest.mark.parametrize("version", ["10.2.0", "12.0.1"])
def test_another_tensorrt_is_refused(device: Device, version: str) -> None:
    device.tensorrt(version)
    code, error = device.run()
    assert code == 5
    assert error == f"error: TensorRT here is {version}, orin takes >=10.3,<12, as JetPack 6.1 to 7 has it"


def test_no_tensorrt_is_refused(device: Device) -> None:
    (device.folder / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.10: cannot open')\n")
    code, error = device.run()
    assert code == 5
    assert "cannot import tensorrt (ImportError: libnvinfer.so.10: cannot open)" in error


def test_another_cpu_is_refused(device: Device) -> None:
    spec = described(device.kit)
    describe(device.kit, {**spec, "cpu": "riscv64"})
    code, error = device.run()
    assert code == 5
    assert error == f"error: this machine is {platform.machine()}, the kit is for orin, which is riscv64: copy it there"


def test_a_changed_file_is_refused(device: Device) -> None:
    path = device.kit / "onnx" / "llm" / "prefill.onnx"
    path.write_bytes(path.read_bytes() + b" ")
    code, error = device.run()
    assert (code, error) == (5, f"error: {path}: changed since the kit was made (sha256 differs): copy the kit again")


def test_a_missing_file_is_refused(device: Device) -> None:
    path = device.kit / "onnx" / "visual" / "model.onnx.data"
    path.unlink()
    assert device.run() == (5, f"error: {path}: missing: copy the kit again")


@pytest.mark.parametrize("text", ["{", "[]", "{}", None], ids=["cut", "list", "empty", "changed"])
def test_a_damaged_manifest_is_refused(device: Device, text: str | None) -> None:
    changed = json.dumps({**described(device.kit), "version_min": "9.0"})
    (device.kit / KIT).write_text(changed if text is None else text)
    assert device.run() == (5, f"error: {device.kit / KIT}: damaged: copy the kit again")


def test_a_kit_of_another_version_is_refused(device: Device) -> None:
    describe(device.kit, {**described(device.kit), "version": 1})
    code, error = device.run()
    assert code == 5
    assert error.startswith(f"error: {device.kit}: written by capa-export ")
    assert error.endswith(", another version: build it with its own build.sh")


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("10.3", "the headers of TensorRT 10.3, and Python the runtime 10.7.0: they must agree"),
        (None, "no NvInferVersion.h"),
    ],
)
def test_headers_must_be_the_runtimes(device: Device, version: str | None, message: str) -> None:
    spec = described(device.kit)
    describe(device.kit, {**spec, "plugins": "native"})
    device.tensorrt("10.7.0")
    include = device.folder / "include"
    include.mkdir()
    if version:
        major, minor = version.split(".")
        text = f"#define NV_TENSORRT_MAJOR {major} // of ours\n#define NV_TENSORRT_MINOR {minor}\n"
        (include / "NvInferVersion.h").write_text(text)
    code, error = device.run("--tensorrt-include", str(include))
    assert code == 5 and message in error


def test_a_trial_is_said_in_full(device: Device) -> None:
    code, error = device.run("--runtime", "tensorrt_rtx", "--compute-capability", "8.6")
    assert (code, error) == (5, "error: a trial needs --runtime, --compute-capability and --out, all three")
    code, error = device.run("--lowered")
    assert (code, error) == (5, "error: --lowered is for a trial, with --runtime; on the device its TensorRT decides")


def test_through_capa_export_an_error_is_its_own(spare: Path) -> None:
    (spare / KIT).unlink()
    with pytest.raises(CapaError, match="no kit") as caught:
        build_kit(spare)
    assert caught.value.code is ExitCode.ENGINE


# Trials with TensorRT-RTX in TensorRT's place.


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables for a Python that finds TensorRT-RTX, and no other package."""
    tensorrt_rtx = pytest.importorskip("tensorrt_rtx", reason="needs the extra rtx")
    packages = tmp_path_factory.mktemp("packages")
    site = Path(tensorrt_rtx.__file__).parents[1]
    for name in ("tensorrt_rtx", "tensorrt_rtx_libs", "tensorrt_rtx_bindings"):
        if (site / name).exists():
            (packages / name).symlink_to(site / name)
    return {"PYTHONPATH": str(packages)}


@pytest.fixture(scope="module")
def headers() -> Path:
    """Those of a TensorRT that plugins compile against."""
    return headers_of_tensorrt()


@pytest.fixture(scope="module")
def native_kit(wide: Bundle, orin: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("native") / "kit"
    write_kit(wide, orin, folder, plugins="native")
    return folder


@pytest.mark.trt
@pytest.mark.slow
@pytest.mark.parametrize(("plugins", "lowered"), once_each(["none", "native"], [False, True]))
def test_a_bare_python_builds_the_kit(
    request: pytest.FixtureRequest, bare_python: dict[str, str], tmp_path: Path, plugins: str, *, lowered: bool
) -> None:
    kit: Path = request.getfixturevalue("kit" if plugins == "none" else "native_kit")
    include = [] if plugins == "none" else ["--tensorrt-include", request.getfixturevalue("headers")]
    python, out = tmp_path / "python3", tmp_path / "trial"
    # -S leaves site-packages out: only what PYTHONPATH names is found.
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    python.chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "PYTHON": str(python), **bare_python}
    bare = subprocess.run([python, "-c", "import numpy"], env=environment, capture_output=True, check=False)
    assert bare.returncode, "finds numpy"
    options = ["--runtime", "tensorrt_rtx", "--compute-capability", "8.6", "--out", out, *["--lowered"] * lowered]
    command = [kit / "build.sh", *options, *include]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    for name in ENGINES:
        assert (out / f"{name}.engine").stat().st_size > 10_000
        assert f"building {name}.engine from onnx/" in run.stderr
    assert ("lowered" in run.stderr) is lowered
    layers = parse_layers((out / "llm" / "prefill.layers.txt").read_text(encoding="utf-8"))
    assert sum(layer.type == "custom_layer" for layer in layers) == (3 if plugins == "native" else 0)
    assert weight_copies(layers, set()) == []
    assert not cache_copies(parse_layers((out / "llm" / "decode.layers.txt").read_text(encoding="utf-8")))
    library = out / "libcapa_plugins.so"
    assert library.exists() is (plugins == "native")
    if library.exists():
        assert library.stat().st_size < (out / "llm" / "prefill.engine").stat().st_size, "is not in the engine"
    files = {path.relative_to(kit).as_posix() for path in kit.rglob("*") if path.is_file()}
    assert files - {KIT} == set(described(kit)["files"]), "a trial leaves the kit as it was"


@pytest.mark.trt
@pytest.mark.slow
def test_through_capa_export_with_weights_as_inputs(wide: Bundle, orin: Target, headers: Path, tmp_path: Path) -> None:
    """None is copied, not even the one that a plugin reads beside a multiplication: that would raise."""
    kit, out = tmp_path / "kit", tmp_path / "trial"
    write_kit(wide, orin, kit, plugins="native", weights="external")
    built = build_kit(kit, tensorrt_include=headers, runtime="tensorrt_rtx", compute_capability="8.6", out=out)
    assert (built["runtime"], built["compute_capabilities"], built["weights"]) == ("tensorrt-rtx", ["8.6"], "external")
    assert built["engines"].keys() == set(ENGINES)
    assert all(one["bytes"] == (out / f"{name}.engine").stat().st_size for name, one in built["engines"].items())
    assert [one["custom_layers"] for one in built["engines"].values()] == [0, 3, 0]
    layers = json.loads((out / "llm" / "prefill.layers.json").read_text(encoding="utf-8"))
    weights = json.loads((kit / "llm" / "prefill.weights.json").read_text(encoding="utf-8"))
    assert len(weights) > 50
    assert set(weights) <= {tensor["name"] for layer in layers for tensor in layer["inputs"]}
