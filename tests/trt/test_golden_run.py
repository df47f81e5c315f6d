"""Kits hold their engines against the golden on the device: with a TensorRT and a driver that move data."""

import ast
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from capa_export.base import parent
from capa_export.base.errors import ExitCode
from capa_export.bundle.store import Bundle, digest_of
from capa_export.config.recipe import load_recipe
from capa_export.config.target import load_target
from capa_export.trt import builder, golden, golden_run, kit_device, kit_file, kit_switch
from capa_export.trt.builder import SWITCHES
from capa_export.trt.golden_run import differences, problem
from capa_export.trt.kit import write_kit
from capa_export.trt.kit_file import KIT
from capa_export.trt.kit_switch import UNCHECKED

ENGINES = ("visual/visual", "llm/prefill", "llm/decode")


@pytest.fixture(scope="module")
def kit(bundle: Bundle) -> Path:
    """For this CPU, so that it can be built here."""
    folder = bundle.folder / "engines" / "orin"
    write_kit(bundle, load_target("orin"), folder, plugins="none")
    change(folder, lambda spec: spec.update(cpu=platform.machine()))
    return folder


def change(kit: Path, how: Callable[[dict[str, Any]], object]) -> None:
    spec = json.loads((kit / KIT).read_text(encoding="utf-8"))
    del spec["digest"]
    how(spec)
    (kit / KIT).write_text(json.dumps({**spec, "digest": digest_of(spec)}), encoding="utf-8")


class OnDevice:
    """A copy of the kit on the device."""

    def __init__(self, kit: Path, variables: dict[str, str]) -> None:
        self.kit, self.variables = kit, variables

    def build(self, **variables: str) -> tuple[int, list[str]]:
        environment = {**os.environ, **self.variables, **variables}
        command = [str(self.kit / "build.sh")]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        return run.returncode, run.stderr.splitlines()

    @property
    def engines(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.kit.rglob("*.engine")}


@pytest.fixture
def on_device(kit: Path, tmp_path: Path, device: dict[str, str]) -> OnDevice:
    return OnDevice(Path(shutil.copytree(kit, tmp_path / "kit")), device)


@pytest.fixture(scope="module")
def built(kit: Path, device: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[OnDevice, list[str]]:
    """A kit that was built well, and what it said."""
    found = OnDevice(Path(shutil.copytree(kit, tmp_path_factory.mktemp("built") / "kit")), device)
    code, lines = found.build()
    assert code == 0, lines
    return found, lines


def close(line: str) -> bool:
    """Whether a line says what a lowered graph does that adds in another order: less than half of what FP16 may do."""
    figures = re.search(r"cosine ([\d.]+), norm off by ([\d.e-]+)$", line)
    if figures is None:
        return re.search(r"(\d+) of \1 as in the golden$", line) is not None
    return float(figures[1]) > 0.9995 and float(figures[2]) < 0.005


def test_engines_that_compute_what_the_graphs_compute_get_their_names(built: tuple[OnDevice, list[str]]) -> None:
    kit, lines = built[0].kit, built[1]
    assert all((kit / f"{name}.engine").is_file() for name in ENGINES)
    assert not list(kit.rglob(f"*{UNCHECKED}"))
    said = lines[lines.index("running the golden") + 1 :]
    assert [line.rpartition(": ")[0] for line in said] == [
        "visual/visual.engine: image_features",
        "llm/prefill.engine: logits",
        "llm/prefill.engine: kept_positions.0",
        *["llm/decode.engine: logits"] * 2,
    ]
    assert all(close(line) for line in said)


def test_weights_that_are_inputs_are_uploaded(bundle: Bundle, device: dict[str, str], tmp_path: Path) -> None:
    kit = tmp_path / "kit"
    write_kit(bundle, load_target("orin"), kit, plugins="none", weights="external")
    for name in ENGINES:
        onnx = kit / kit_file.read_kit(kit)["engines"][name]["lowered"]
        (kit / f"{name}.engine").write_text(
            json.dumps({"onnx": str(onnx), "wrong": "", "profiles": 1}), encoding="utf-8"
        )
    said: list[str] = []
    given = kit, [str(kit / builder.CHECKER)], tmp_path, {**os.environ, **device}, said.append
    builder._check_golden(kit, kit_file.read_kit(kit), *given)
    assert len(said) == 6
    assert all(close(line) for line in said[1:])
    # One that is none of the kit's files is not followed.
    change(kit, lambda spec: spec["files"].pop("llm/prefill.weights.json"))
    with pytest.raises(kit_file.KitError, match=r"prefill\.engine: takes .*, of which the golden has no value"):
        builder._check_golden(kit, kit_file.read_kit(kit), *given)


def test_one_engine_is_run_as_prefill_and_as_decode(bundle: Bundle, device: dict[str, str], tmp_path: Path) -> None:
    write_kit(bundle, load_target("orin"), tmp_path / "kit", plugins="none", weights="joined")
    change(tmp_path / "kit", lambda spec: spec.update(cpu=platform.machine()))
    on_device = OnDevice(tmp_path / "kit", device)
    code, lines = on_device.build()
    assert code == 0, lines
    assert sorted(on_device.engines) == ["decoder.engine", "visual.engine"]
    said = lines[lines.index("running the golden") + 2 :]
    assert [line.rpartition(": ")[0] for line in said] == [
        "llm/decoder.engine: logits",
        "llm/decoder.engine: kept_positions.0",
        *["llm/decoder.engine: logits"] * 2,
    ]
    assert all(close(line) for line in said)
    code, lines = on_device.build(MISCOMPILED="prefill", MISCOMPILED_AS="scaled")
    assert code == builder.FAILED and "llm/decoder.engine computes something else than the golden: logits" in lines[-1]


def golden_of(built: OnDevice, scratch: Path, engine: str, how: str) -> str:
    """Why the golden run refuses engines of which one is wrong in a way."""
    for name in ENGINES:
        plan = json.loads((built.kit / f"{name}.engine").read_text(encoding="utf-8"))
        wrong = {**plan, "wrong": how if engine in name else ""}
        (scratch / f"{name}.engine").parent.mkdir(exist_ok=True)
        (scratch / f"{name}.engine").write_text(json.dumps(wrong), encoding="utf-8")
    environment = {**os.environ, **built.variables}
    checker = [str(built.kit / builder.CHECKER)]
    with pytest.raises(kit_file.KitError) as error:
        builder._check_golden(
            built.kit, kit_file.read_kit(built.kit), scratch, checker, scratch, environment, say=lambda _: None
        )
    return str(error.value)


@pytest.mark.parametrize(
    ("engine", "how", "message"),
    [
        ("visual", "rolled", r"visual/visual\.engine .*: image_features: cosine "),
        ("prefill", "rolled", r"llm/prefill\.engine .*: logits: cosine "),
        ("prefill", "scaled", r"logits: norm off by 0\.(?:099|100)\d where the golden takes 0\.01 or less"),
        ("prefill", "nan", "logits: cosine nan"),
        ("prefill", "unwritten", "logits: cosine nan"),
        ("prefill", "others", r"kept_positions\.0: \d+ of \d+ are others"),
        ("decode", "rolled", r"llm/decode\.engine .*: logits: cosine "),
    ],
)
def test_wrong_code_is_named(
    built: tuple[OnDevice, list[str]],
    tmp_path: Path,
    engine: str,
    how: str,
    message: str,
) -> None:
    error = golden_of(built[0], tmp_path, engine, how)
    assert re.search(message, error), error
    assert "computes something else than the golden" in error
    assert f"{SWITCHES}='-peep:match_dual_gemm=off -peep:fc_h_fusion=off " in error
    assert "validate BUNDLE --bisect" in error
    assert error.endswith(f"log: {built[0].kit / 'golden.log'}")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("unloadable", "golden run: llm/prefill.engine: cannot be loaded (tensorrt: magicTag assertion failed)"),
        ("crash", "golden run: its process died of SIGABRT"),
    ],
)
def test_an_engine_that_does_not_run_is_none(
    built: tuple[OnDevice, list[str]], tmp_path: Path, how: str, message: str
) -> None:
    assert message in golden_of(built[0], tmp_path, "prefill", how)


def test_the_switches_mend_it_and_a_version_is_seen_not_to_do_without(on_device: OnDevice) -> None:
    """As the README says: built once with the variable set and empty; what was there before stays."""
    newer = {"STANDIN_VERSION": "10.13.3", "MISCOMPILED": "prefill"}
    code, lines = on_device.build(**newer)
    assert code == 0, lines
    before = on_device.engines
    assert len(before) == 3
    code, lines = on_device.build(**newer, **{SWITCHES: ""})
    assert code == builder.FAILED == ExitCode.ENGINE
    assert lines[-1].startswith("error: llm/prefill.engine computes something else than the golden: logits: cosine ")
    assert f"it was built with {SWITCHES}='': unset that, and build again" in lines[-1]
    assert on_device.engines == before
    assert {path.name for path in on_device.kit.rglob(f"*{UNCHECKED}")} == {
        f"{name.partition('/')[2]}{UNCHECKED}" for name in ENGINES
    }


def test_through_capa_export_it_is_the_same(on_device: OnDevice) -> None:
    """With this package's own checker, whatever lies in the kit; in a process, since libcuda is found at its start."""
    (on_device.kit / builder.CHECKER).write_text("raise SystemExit(9)\n", encoding="utf-8")
    change(on_device.kit, lambda spec: spec["files"].pop(builder.CHECKER))
    checkout = Path(__file__).parents[2]
    paths = os.pathsep.join([on_device.variables["PYTHONPATH"], str(checkout)])
    environment = {**os.environ, **on_device.variables, "PYTHONPATH": paths, "MISCOMPILED": "decode"}
    command = [sys.executable, str(checkout / "cli.py"), "engine", str(on_device.kit), "--on-device"]

    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == ExitCode.ENGINE, run.stderr
    assert "error: llm/decode.engine computes something else than the golden" in run.stderr
    assert not on_device.engines


def test_a_kit_without_a_golden_says_so(on_device: OnDevice) -> None:
    change(on_device.kit, lambda spec: spec.update(golden=None))
    code, lines = on_device.build(MISCOMPILED="prefill")
    assert code == 0
    assert lines[-1] == "the kit has no golden: what the engines compute is not checked"


def test_bounds_are_the_recipe_s_gates(kit: Path) -> None:
    gate = load_recipe("tiny-qwen25vl").parity.fp16
    assert json.loads((kit / KIT).read_text(encoding="utf-8"))["golden"] == {
        "logits": {"cosine": gate.cosine.limit, "norm_ratio": gate.norm_ratio.limit},
        "hidden": {"cosine": gate.hidden_cosine.limit, "norm_ratio": gate.hidden_norm_ratio.limit},
        "share": 0.01,
    }
    text = (kit / "README.md").read_text(encoding="utf-8")
    assert f"logits by a cosine of {gate.cosine.limit:g}" in text
    assert f"`{SWITCHES}= ./build.sh`" in text and "see the golden run pass" in text


BOUNDS = {
    "logits": {"cosine": 0.999, "norm_ratio": 0.01},
    "hidden": {"cosine": 0.99, "norm_ratio": 0.02},
    "share": 0.01,
}


def judged(golden: list[float], found: list[float], *, output: str = "logits", moved: bool = False) -> str | None:
    return problem(output, differences(golden, found), BOUNDS, moved=moved)


def test_another_token_is_a_tie_or_a_problem() -> None:
    """At cosines that the bound lets through."""
    golden = np.random.default_rng(0).standard_normal(10_000)
    golden[:2] = 5, 4.9
    found = golden.copy()
    found[:2] = 4.9, 5
    assert judged([*golden], [*found]) is None
    golden[1], found[:2] = 3, (3.5, 4)
    said = judged([*golden], [*found])
    assert said is not None and said.startswith("another token comes first, which the golden has 2")
    assert judged([*golden], [*found], output="image_features") is None


def test_moved_positions_loosen_the_logits_to_hidden_states() -> None:
    golden = np.random.default_rng(0).standard_normal(10_000)
    golden[0] = 30
    found = golden + 0.1 * np.random.default_rng(1).standard_normal(10_000)
    assert differences([*golden], [*found])["cosine"] == pytest.approx(0.9955, abs=5e-4)
    assert judged([*golden], [*found]) is not None
    assert judged([*golden], [*found], moved=True) is None


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.int32])
def test_numbers_are_read_without_arrays(dtype: Any) -> None:
    values = np.random.default_rng(0).normal(0, 100, 999).astype(dtype)
    name = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int64": "INT64", "int32": "INT32"}
    found = golden_run._decoded(values.tobytes(), name[values.dtype.name])
    np.testing.assert_array_equal(np.array(found), values.astype(np.float64))


def test_fp32_becomes_bf16_as_everywhere() -> None:
    values = np.random.default_rng(0).normal(0, 100, 999).astype(np.float32)
    expected = values.astype(ml_dtypes.bfloat16)
    assert golden_run._encoded(values.tobytes(), "FLOAT", "BF16") == expected.tobytes()


_KIT_MODULES = {"kit_file", "kit_device", "kit_switch", "parent"}


@pytest.mark.parametrize("module", [builder, golden_run, kit_device, kit_file, kit_switch, parent])
def test_what_a_kit_runs_takes_the_standard_library_alone(module: Any) -> None:
    """And TensorRT, which is imported by its name."""
    nodes = [*ast.walk(ast.parse(Path(module.__file__).read_text(encoding="utf-8")))]
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    beside = {*_KIT_MODULES, *(f"capa_export.trt.{name}" for name in _KIT_MODULES), "capa_export.base.parent"}
    assert {name.partition(".")[0] for name in imported - beside} <= set(sys.stdlib_module_names)


def test_a_step_for_engines_has_its_cache_in_blocks() -> None:
    past = np.random.default_rng(0).standard_normal((1, 2, 300, 4))
    lengths = np.array([[300]])
    grown = np.concatenate([past, np.ones((1, 2, 1, 4))], axis=2)
    run = {"past_key_values.0.key": past, "past_lengths": lengths}, {"present.0.key": grown, "logits": lengths}
    inputs, outputs = golden.in_blocks(*run)
    cache = inputs.pop("past_key_values.0.key")
    assert cache.shape == (1, 2, 2, 256, 4)
    rows = cache.reshape(1, 2, 512, 4)
    assert (rows[:, :, :300] == past).all() and not rows[:, :, 300:].any()
    assert inputs == {"past_lengths": lengths}
    assert outputs["present.0.key"].tolist() == np.ones((1, 2, 1, 4)).tolist()
