"""Holds a machine against the device of a kit: CPU, GPU, TensorRT and its headers; with the standard library alone."""

import ctypes
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or __package__:
    from capa_export.base.parent import tied
    from capa_export.trt.kit_file import KitError
else:
    # Beside this file in a kit.
    from kit_file import KitError
    from parent import tied

__all__ = ["check_device", "check_version", "find_headers", "numbers_of", "read_version"]

_PRINT_VERSION = """import sys
sys.path[:] = filter(None, sys.path)
import importlib
print(importlib.import_module(sys.argv[1]).__version__)
"""
_HEADER = "NvInferVersion.h"
_INCLUDES = tuple(Path(f"/usr/include/{arch}-linux-gnu") for arch in ("aarch64", "x86_64"))
_MAJOR, _MINOR = 75, 76
"""The driver's numbers of the attributes that hold the compute capability."""


def check_device(spec: Mapping[str, Any]) -> None:
    """Hold CPU and GPU against the kit's."""
    cpu, wanted = platform.machine(), spec["cpu"]
    if wanted and cpu != wanted:
        raise KitError(f"this machine is {cpu}, the kit is for {spec['target']}, which is {wanted}: copy it there")
    capability, (wanted,) = _compute_capability(), spec["compute_capabilities"]
    if capability != wanted:
        raise KitError(
            f"the GPU here has compute capability {capability}, the kit is for {spec['target']}, which has "
            f"{wanted}: make one with build --target for this device"
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


def read_version(module: str, env: Mapping[str, str]) -> str:
    """Of the runtime, imported in a process of its own, since it may abort the one that imports it."""
    command = [sys.executable, "-c", _PRINT_VERSION, module]
    run = subprocess.run(tied(command), env=env, capture_output=True, text=True, check=False)
    if run.returncode:
        lines = run.stderr.strip().splitlines() or [f"exit code {run.returncode}"]
        where = "; JetPack has it in python3-libnvinfer" if module == "tensorrt" else ""
        raise KitError(f"{sys.executable} cannot import {module} ({lines[-1]}){where}")
    return run.stdout.split()[-1]


def check_version(spec: Mapping[str, Any], version: str) -> None:
    """Hold the version of TensorRT against the range that the kit takes."""
    if not numbers_of(spec["version_min"]) <= numbers_of(version) < numbers_of(spec["version_below"]):
        jetpack = f", as JetPack {spec['jetpack']} has it" if spec["jetpack"] else ""
        wanted = f">={spec['version_min']},<{spec['version_below']}{jetpack}"
        raise KitError(f"TensorRT here is {version}, {spec['target']} takes {wanted}")


def numbers_of(version: str) -> tuple[int, ...]:
    """The numbers in a version."""
    return tuple(int(part) for part in re.findall(r"\d+", version))


def find_headers(given: Path | None, version: str | None) -> Path:
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
    if version and numbers_of(have) != numbers_of(version)[:2]:
        raise KitError(f"{found} has the headers of TensorRT {have}, and Python the runtime {version}: they must agree")
    return found
