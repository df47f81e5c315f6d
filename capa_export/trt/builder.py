"""Builds the engines of a kit on its device: `python3 builder.py` in the kit, where this file has that name.

It needs the standard library and the device's own TensorRT, and no GPU code of its own.
"""

import argparse
import ctypes
import hashlib
import importlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["KIT", "KitError", "build", "main"]

KIT = "kit.json"
FAILED = 5
"""Exit code of whatever keeps an engine from being built."""
_HEADER = "NvInferVersion.h"
_INCLUDES = tuple(Path(f"/usr/include/{arch}-linux-gnu") for arch in ("aarch64", "x86_64"))
_MAJOR, _MINOR = 75, 76
"""The driver's numbers of the attributes that hold the compute capability."""

Say = Callable[[str], None]


class KitError(Exception):
    """Why there are no engines, in one line."""


def main() -> int:
    """Build the kit that this file lies in; returns the exit code."""
    parser = argparse.ArgumentParser(prog="build.sh", description="Build the engines of this kit, on its device.")
    parser.add_argument("--tensorrt-include", type=Path, metavar="DIR", help="folder of TensorRT's headers")
    parser.add_argument("--check", action="store_true", help="only look whether this is the kit's device")
    trial = parser.add_argument_group("trial", "Build elsewhere, to see that the kit is whole. Not for the device.")
    trial.add_argument("--runtime", help="module to build with in place of tensorrt, such as tensorrt_rtx")
    trial.add_argument("--compute-capability", metavar="X.Y", help="GPU to build for with --runtime, such as 8.6")
    trial.add_argument("--lowered", action="store_true", help="take the graphs for older TensorRT")
    trial.add_argument("--out", type=Path, metavar="DIR", help="where the engines of a trial go")
    given = vars(parser.parse_args())
    try:
        with tempfile.TemporaryDirectory() as links:
            environment: Mapping[str, str] = {}
            if given["runtime"] == "tensorrt_rtx":
                # Beside this file in a kit, which is to stay as it is.
                sys.dont_write_bytecode = True
                finder = importlib.import_module("parser_library")
                environment = finder.ensure_parser_library(Path(links))
            build(Path(__file__).resolve().parent, **given, environment=environment)
    except KitError as error:
        _say(f"error: {error}")
        return FAILED
    except OSError as error:
        _say(f"error: {error.filename}: {error.strerror}")
        return FAILED
    return 0


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def build(
    kit: Path,
    *,
    tensorrt_include: Path | None = None,
    check: bool = False,
    runtime: str | None = None,
    compute_capability: str | None = None,
    lowered: bool = False,
    out: Path | None = None,
    environment: Mapping[str, str] = {},
    say: Say = _say,
) -> dict[str, dict[str, Any]]:
    """Check device, TensorRT and files, compile the plugins, and build every engine.

    Args:
        kit: the folder.
        tensorrt_include: folder of TensorRT's headers; None looks where packages put them.
        check: stop before anything is built.
        runtime: module to build with in a trial, in place of the kit's; the device is then not looked at.
        compute_capability: GPU to build for in a trial.
        lowered: whether a trial takes the graphs for older TensorRT.
        out: where the engines of a trial go; those of the device go into the kit.
        environment: variables to add for the building processes.
        say: told what is being done.

    Returns:
        By engine: its `seconds` and `bytes`, and what the building process says.

    Raises:
        KitError: this is not the device, a file or TensorRT is missing or another, or TensorRT refused.
    """
    spec = _read(kit)
    trial = (runtime, compute_capability, out)
    if any(trial) and not all(trial):
        raise KitError("a trial needs --runtime, --compute-capability and --out, all three")
    if lowered and not runtime:
        raise KitError("--lowered is for a trial, with --runtime; on the device its TensorRT decides")
    module = runtime or spec["runtime"]
    if not runtime:
        _check_device(spec)
    env = {**os.environ, **environment}
    version = _version(module, env)
    if not runtime:
        _check_version(spec, version)
        lowered = _numbers(version) < _numbers(spec["lowered_below"])
    _check_files(kit, spec["files"], say)
    include = None
    if spec["plugins"] == "native":
        include = _headers(tensorrt_include, None if runtime else version)
    if check:
        say(f"this is {spec['target']}, with {module} {version}")
        return {}
    folder = (out or kit).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".build-") as scratch:
        library = _compile(kit, include, Path(scratch), say) if include else None
        result = {
            name: _build_engine(
                kit,
                folder,
                Path(scratch),
                name,
                {
                    "runtime": module,
                    "compute_capabilities": [compute_capability] if compute_capability else [],
                    "version_min": version,
                    "version_below": f"{_numbers(version)[0] + 1}",
                    "plugins": {
                        "kind": spec["plugins"],
                        "library": library and str(library),
                        "count": engine["plugins"],
                    },
                    "shapes": engine["shapes"],
                    "shape_inputs": engine["shape_inputs"],
                },
                engine["lowered" if lowered else "onnx"],
                env,
                say,
            )
            for name, engine in spec["engines"].items()
        }
        if library:
            library.replace(folder / library.name)
    return result


def _read(kit: Path) -> dict[str, Any]:
    try:
        spec = json.loads((kit / KIT).read_text(encoding="utf-8"))
        digest = spec.pop("digest")
        if digest != hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest():
            raise ValueError("its digest differs from what it holds")
    except OSError as error:
        raise KitError(f"{kit}: no kit ({KIT}: {error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise KitError(f"{kit / KIT}: damaged: copy the kit again") from error
    return spec


def _check_device(spec: Mapping[str, Any]) -> None:
    """Hold CPU and GPU against the kit's."""
    cpu, wanted = platform.machine(), spec["cpu"]
    if wanted and cpu != wanted:
        raise KitError(f"this machine is {cpu}, the kit is for {spec['target']}, which is {wanted}: copy it there")
    capability = _compute_capability()
    if capability != spec["compute_capability"]:
        raise KitError(
            f"the GPU here has compute capability {capability}, the kit is for {spec['target']}, which has "
            f"{spec['compute_capability']}: make one with build --target for this device"
        )


def _compute_capability() -> str:
    """Of the first GPU, as `8.7`."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise KitError("no NVIDIA driver here (libcuda.so.1): run this on the device") from error
    device, numbers = ctypes.c_int(), (ctypes.c_int(), ctypes.c_int())
    status = driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0)
    for attribute, number in zip((_MAJOR, _MINOR), numbers, strict=True):
        status = status or driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
    if status:
        raise KitError(f"the NVIDIA driver finds no GPU here (CUDA error {status}): run this on the device")
    return ".".join(str(number.value) for number in numbers)


def _version(module: str, env: Mapping[str, str]) -> str:
    """Of the runtime, imported in a process of its own, since it may abort the one that imports it."""
    code = f"import {module}; print({module}.__version__)"
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    if run.returncode:
        lines = run.stderr.strip().splitlines() or [f"exit code {run.returncode}"]
        where = "; JetPack has it in python3-libnvinfer" if module == "tensorrt" else ""
        raise KitError(f"{sys.executable} cannot import {module} ({lines[-1]}){where}")
    return run.stdout.split()[-1]


def _check_version(spec: Mapping[str, Any], version: str) -> None:
    if not _numbers(spec["version_min"]) <= _numbers(version) < _numbers(spec["version_below"]):
        jetpack = f", as JetPack {spec['jetpack']} has it" if spec["jetpack"] else ""
        wanted = f">={spec['version_min']},<{spec['version_below']}{jetpack}"
        raise KitError(f"TensorRT here is {version}, {spec['target']} takes {wanted}")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


def _check_files(kit: Path, files: Mapping[str, str], say: Say) -> None:
    say(f"checking {len(files)} files")
    for name, sha256 in files.items():
        path = kit / name
        if not path.is_file():
            raise KitError(f"{path}: missing: copy the kit again")
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        if digest.hexdigest() != sha256:
            raise KitError(f"{path}: changed since the kit was made (sha256 differs): copy the kit again")


def _headers(given: Path | None, version: str | None) -> Path:
    """The folder of TensorRT's headers, which are of the given version if there is one."""
    places = [given] if given else list(_INCLUDES)
    found = next((place for place in places if (place / _HEADER).is_file()), None)
    if found is None:
        raise KitError(
            f"no {_HEADER} in {' or '.join(map(str, places))}: install libnvinfer-headers-dev, or pass "
            "--tensorrt-include DIR"
        )
    text = (found / _HEADER).read_text(encoding="utf-8", errors="replace")
    numbers = [
        re.search(rf"#define (?:NV_TENSORRT|TRT)_{part}(?:_ENTERPRISE)? (\d+)", text) for part in ("MAJOR", "MINOR")
    ]
    have = ".".join(number[1] for number in numbers if number)
    if version and _numbers(have) != _numbers(version)[:2]:
        raise KitError(f"{found} has the headers of TensorRT {have}, and Python the runtime {version}: they must agree")
    return found


def _compile(kit: Path, include: Path, scratch: Path, say: Say) -> Path:
    """The plugin library, compiled against the device's headers."""
    say("compiling the plugins")
    library = scratch / "libcapa_plugins.so"
    command = ["/bin/sh", str(kit / "plugins" / "build.sh"), str(include.resolve()), str(library)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        lines = (run.stderr or run.stdout).strip().splitlines() or [f"exit code {run.returncode}"]
        first = next((line for line in lines if "error" in line), lines[-1])
        raise KitError(f"the plugins do not compile: {first}")
    return library


def _build_engine(
    kit: Path, folder: Path, scratch: Path, name: str, spec: dict[str, Any], onnx: str, env: Mapping[str, str], say: Say
) -> dict[str, Any]:
    """Build one engine in a process of its own; the plan takes its place when it is whole."""
    say(f"building {name}.engine from {onnx}")
    engine = folder / f"{name}.engine"
    engine.parent.mkdir(parents=True, exist_ok=True)
    log = engine.with_suffix(".log")
    files = {part: str(scratch / part) for part in ("plan", "layers", "result")}
    spec = {**spec, **files, "onnx": str(kit / onnx), "beside": str(kit / onnx)}
    (scratch / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
    start = time.monotonic()
    with log.open("wb") as output:
        command = [sys.executable, str(kit / "engine_worker.py"), str(scratch / "spec.json")]
        run = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output, check=False)
    result_path = Path(files["result"])
    if not result_path.exists():
        # Killed, or TensorRT aborted.
        raise KitError(f"{name}: the building process ended with status {run.returncode}; log: {log}")
    result = json.loads(result_path.read_text(encoding="utf-8"))
    result_path.unlink()
    if "error" in result:
        raise KitError(f"{name}: {result['error']}; log: {log}")
    Path(files["layers"]).replace(engine.with_suffix(".layers.txt"))
    # The plan comes last: where it is, the rest is.
    Path(files["plan"]).replace(engine)
    return {**result, "seconds": round(time.monotonic() - start, 3), "bytes": engine.stat().st_size}


if __name__ == "__main__":
    sys.exit(main())
