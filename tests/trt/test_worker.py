"""What the building process is given, and what it refuses before TensorRT is asked."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from capa_export.config.target import load_target
from capa_export.trt import builder, golden_run, worker
from capa_export.trt.builder import SWITCHES, switches
from capa_export.trt.doctor import examine
from capa_export.trt.engines import CHECKER, WORKER
from tests.orphans import SLEEPER, ended_with_parent


def library(folder: Path, headers: int) -> str:
    """A library that says what headers it was compiled against."""
    source, path = folder / "library.c", folder / f"{headers}.so"
    source.write_text(f"int capaTensorRTHeaders(void) {{ return {headers}; }}\n", encoding="utf-8")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", path, source], check=True)  # noqa: S607
    return str(path)


@pytest.mark.parametrize(
    ("module", "version", "headers", "wanted"),
    [
        ("tensorrt_rtx", "1.7.1", 1003, "11 or later"),
        ("tensorrt_rtx", "1.7.1", 1101, None),
        ("tensorrt", "10.13.3", 1101, "10"),
        ("tensorrt", "10.13.3", 1013, None),
        ("tensorrt", "11.1.0", 1016, "11 or later"),
    ],
)
def test_a_library_that_would_misread_the_logger_is_refused(
    tmp_path: Path, module: str, version: str, headers: int, wanted: str | None
) -> None:
    trt, path = SimpleNamespace(__name__=module, __version__=version), library(tmp_path, headers)
    if wanted is None:
        worker._check_headers(trt, path)
        return
    with pytest.raises(worker.BuildError) as error:
        worker._check_headers(trt, path)
    assert str(error.value) == (
        f"{path}: compiled against TensorRT {headers // 100}.{headers % 100}; {module} {version} takes libraries of "
        f"headers of {wanted}"
    )


DUAL, FUSION = "-peep:match_dual_gemm=off", "-peep:fc_h_fusion=off"
COMPILER = "-mlir:autotune:num_threads=1 -mlir:collective:fp4=off -cask_fusion:async_policy=1"


@pytest.mark.parametrize(
    ("version", "capability", "one_prompt", "expected"),
    [
        ((10, 12, 0), "8.7", True, ""),
        ((10, 13, 3, 9), "11.0", True, f"{DUAL} {FUSION}"),
        ((10, 14), "8.7", False, DUAL),
        ((10, 15), "8.7", True, f"{FUSION} {COMPILER}"),
        ((11, 1), "9.0", True, f"{FUSION} {COMPILER}"),
        ((11, 1), "11.0", True, f"{DUAL} {FUSION} {COMPILER}"),
    ],
)
def test_switches_by_version_gpu_and_batch(
    version: tuple[int, ...],
    capability: str,
    one_prompt: bool,  # noqa: FBT001
    expected: str,
) -> None:
    assert switches(version, capability, one_prompt=one_prompt) == expected


@pytest.mark.parametrize("given", [None, ""])
def test_tensorrt_is_started_with_its_switches_unless_they_are_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str | None
) -> None:
    seen: list[str | None] = []

    def run(worker: object, task: object, file: Path, environment: dict[str, str], *_: object) -> dict[str, object]:
        seen.append(environment.get(SWITCHES))
        raise builder.KitError("enough")

    monkeypatch.setattr(builder, "_run", run)
    environment = {} if given is None else {SWITCHES: given}
    shapes = {"inputs_embeds": [[1, 1, 8], [1, 1, 8], [4, 1, 8]]}
    profiles = {"x": {"shapes": shapes, "shape_inputs": {}}}
    engine = {"onnx": "x", "plugins": 0, "profiles": profiles, "capa_nodes": 0}
    spec = {
        "runtime": "tensorrt",
        "version_min": "10.13.3",
        "version_below": "11",
        "plugins": "none",
        "install": "",
        "gpus": ["11.0"],
        "compute_capabilities": [],
        "engines": {"decode": engine},
    }
    said: list[str] = []
    with pytest.raises(builder.KitError, match="enough"):
        list(builder.build_engines(tmp_path, spec, tmp_path, worker=[], environment=environment, say=said.append))
    assert seen == [f"{DUAL} {FUSION}" if given is None else given]
    assert (f"{SWITCHES}={DUAL} {FUSION}" in said) == (given is None)
    with pytest.raises(builder.KitError, match="enough"):
        list(builder.build_engines(tmp_path, {**spec, "runtime": "tensorrt_rtx"}, tmp_path, worker=[], environment={}))
    assert seen[1:] == [None]


def test_doctor_says_what_a_kit_turns_off() -> None:
    (told,) = (one for one in examine(load_target("orin"), None) if one.check == "wrong code")
    assert told.detail.endswith(
        f"from 10.13 {DUAL} {FUSION}; from 10.15 {FUSION} {COMPILER}; from 11.0 {FUSION} {COMPILER}"
    )
    assert all(one.check != "wrong code" for one in examine(load_target("rtx"), None))


BUILDING = """
import os
from pathlib import Path
from capa_export.trt import builder
folder = Path(os.environ["FOLDER"])
task = {"result": str(folder / "result"), "runtime": "sleeper"}
worker = os.environ["WORKER"].split("|")
builder._run(worker, task, folder / "task.json", os.environ, folder / "log", "")
"""


@pytest.mark.parametrize("of_kit", [False, True])
@pytest.mark.parametrize(("module", "command"), [(worker, WORKER), (golden_run, CHECKER)], ids=["worker", "checker"])
def test_it_ends_with_a_command_that_is_killed(
    tmp_path: Path, module: ModuleType, command: Sequence[str], *, of_kit: bool
) -> None:
    """And so does what it started."""
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    own = shutil.copyfile(module.__file__ or "", tmp_path / "own.py")
    environment = {
        "FOLDER": str(tmp_path),
        "WORKER": str(own) if of_kit else "|".join(command),
        "PYTHONPATH": os.pathsep.join([*filter(None, sys.path), str(tmp_path)]),
    }
    assert ended_with_parent(BUILDING, tmp_path, 2, environment)


COMPILING = """
import os
from pathlib import Path
from capa_export.trt import builder
folder = Path(os.environ["FOLDER"])
builder._compile(folder, folder, folder, lambda _: None)
"""


def test_a_compiler_ends_with_a_command_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    (tmp_path / "build.sh").write_text(f"'{sys.executable}' '{tmp_path / 'sleeper.py'}'; exit 1")
    environment = {"FOLDER": str(tmp_path), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    assert ended_with_parent(COMPILING, tmp_path, 2, environment)
