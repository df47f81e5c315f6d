"""The plugin library: its sources, with the kernels as fatbins, and the compiler's run over them."""

import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from capa_export.base.errors import CapaError, ExitCode, how_to_install
from capa_export.base.files import file_digest
from capa_export.base.parent import tied
from capa_export.base.toml import shipped

if TYPE_CHECKING:
    from capa_export.kernels.compile import CompiledKernel

__all__ = [
    "ARCHITECTURES",
    "LIBRARY",
    "PluginLibrary",
    "build_library",
    "digest_sources",
    "find_headers",
    "write_sources",
]

LIBRARY = "libcapa_plugins.so"

ARCHITECTURES = ("x86_64", "aarch64")
_FOLDERS = tuple(Path(f"/usr/include/{arch}-linux-gnu") for arch in ARCHITECTURES)
"""Where the packages of TensorRT and JetPack put its headers."""
_VERSION_MIN, _VERSION_BELOW = (10, 3), (12, 0)

_PTX_CAPABILITY = "8.0"
"""The oldest GPU there are kernels for: what the driver compiles PTX for is this or newer."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class PluginLibrary:
    """A plugin library, and what it was built with."""

    path: Path
    arch: str
    tensorrt: str
    """Version of the headers."""
    compute_capabilities: tuple[str, ...]
    """That it holds images for; others get PTX."""
    bytes: int
    kernel_seconds: float
    compile_seconds: float


def build_library(
    out: Path,
    *,
    compute_capabilities: Sequence[str],
    tensorrt_include: Path | None = None,
    arch: str | None = None,
    cxx: str | None = None,
    progress: Progress | None = None,
) -> PluginLibrary:
    """Compile the kernels and the library.

    Args:
        out: the library, or the folder to put it in.
        compute_capabilities: GPUs to hold kernels for, such as "8.7".
        tensorrt_include: folder of TensorRT's headers; None looks in the usual places.
        arch: of the CPU, one of `ARCHITECTURES`; None is this machine's.
        cxx: the C++ compiler; None is g++ for `arch`.
        progress: told how many kernels of how many are compiled.

    Raises:
        CapaError: no such architecture, compiler or GPU, no headers or of the wrong version, or the compiler failed.
    """
    arch = arch or platform.machine()
    if arch not in ARCHITECTURES:
        raise CapaError(f"no plugin library for {arch}; there is one for {', '.join(ARCHITECTURES)}", ExitCode.USAGE)
    include, version = find_headers(tensorrt_include, arch)
    compiler = _compiler(arch, cxx)
    path = out if out.suffix == ".so" else out / LIBRARY
    path.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    # Beside the library, so that it can be moved there in one step.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".plugins-") as scratch:
        sources = Path(scratch) / "sources"
        write_sources(sources, compute_capabilities, progress=progress)
        written = time.perf_counter()
        library = Path(scratch) / LIBRARY
        run = subprocess.run(
            tied(["/bin/sh", sources / "build.sh", include.resolve(), library]),
            env=os.environ | {"CXX": compiler, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if run.returncode:
            log = path.with_suffix(".log")
            log.write_text(run.stdout, encoding="utf-8")
            lines = [line for line in run.stdout.splitlines() if "error" in line] or run.stdout.splitlines()
            reason = lines[0] if lines else f"exit code {run.returncode}"
            raise CapaError(f"{compiler} failed: {reason}; see {log}", ExitCode.ENGINE)
        library.replace(path)
    return PluginLibrary(
        path=path,
        arch=arch,
        tensorrt=version,
        compute_capabilities=tuple(compute_capabilities),
        bytes=path.stat().st_size,
        kernel_seconds=written - started,
        compile_seconds=time.perf_counter() - written,
    )


def find_headers(folder: Path | None, arch: str) -> tuple[Path, str]:
    """The folder of TensorRT's headers, and their version.

    Args:
        folder: where they are; None looks in the usual places, that of `arch` first.
        arch: of the library. The headers are the same for all.

    Raises:
        CapaError: there are none, or of a version that is too old or unknown.
    """
    usual = sorted(_FOLDERS, key=lambda one: not one.name.startswith(arch))
    found = next((one for one in ([folder] if folder else usual) if (one / "NvInferVersion.h").is_file()), None)
    if found is None:
        raise CapaError(
            f"no TensorRT headers (NvInferVersion.h) in {folder or ' or '.join(map(str, usual))}: they usually lie in "
            f"{usual[0]}, from the package libnvinfer-headers-dev; elsewhere, pass --tensorrt-include DIR",
            ExitCode.ENGINE,
        )
    text = (found / "NvInferVersion.h").read_text(encoding="utf-8", errors="replace")
    numbers: list[int] = []
    for part in ("MAJOR", "MINOR"):
        # TensorRT-RTX counts its own versions, and says beside them which TensorRT it is.
        match = re.search(rf"#define TRT_{part}_ENTERPRISE (\d+)", text) or re.search(
            rf"#define NV_TENSORRT_{part} (\d+)", text
        )
        if match is None:
            raise CapaError(f"{found / 'NvInferVersion.h'} names no version of TensorRT", ExitCode.ENGINE)
        numbers.append(int(match[1]))
    version = ".".join(map(str, numbers))
    if not _VERSION_MIN <= tuple(numbers) < _VERSION_BELOW:
        raise CapaError(f"{found} has the headers of TensorRT {version}; the plugins take 10.3 to 11", ExitCode.ENGINE)
    return found, version


def _compiler(arch: str, cxx: str | None) -> str:
    native = arch == platform.machine()
    compiler = cxx or ("g++" if native else f"{arch}-linux-gnu-g++")
    if shutil.which(compiler) is None:
        package = "g++" if native else f"g++-{arch.replace('_', '-')}-linux-gnu"
        raise CapaError(f"no compiler {compiler}: apt install {package}, or pass --cxx COMPILER", ExitCode.ENGINE)
    return compiler


def digest_sources() -> dict[str, str]:
    """SHA-256 of the library's own sources, by name."""
    folder = shipped("engines") / "plugins"
    return {str(path.relative_to(folder)): file_digest(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def write_sources(folder: Path, compute_capabilities: Sequence[str], *, progress: Progress | None = None) -> None:
    """Write all that `build.sh` in it needs to compile the library, but for a C++ compiler and TensorRT's headers.

    Args:
        folder: new or empty.
        compute_capabilities: GPUs to hold kernels for, such as "8.7"; PTX for others is added.
        progress: told how many kernels of how many are compiled.

    Raises:
        CapaError: no kernels for a compute capability, or what writes them is not installed.
    """
    from capa_export.kernels import OPERATORS
    from capa_export.kernels.compile import compile_kernels
    from capa_export.kernels.plugins.cpp import assembly, header

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CapaError(f"{folder} is there already: give a folder that is new or empty", ExitCode.USAGE)
    if not compute_capabilities:
        raise CapaError("a plugin library needs a compute capability, such as 8.7", ExitCode.USAGE)
    compiled = compile_kernels(
        OPERATORS, list(dict.fromkeys([_PTX_CAPABILITY, *compute_capabilities])), ptx=True, progress=progress
    )
    kernels = [one for one in compiled if one.kind == "ptx" or one.compute_capability in compute_capabilities]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".sources-") as scratch:
        # The folder of tempfile is private to the user.
        sources = Path(scratch) / "plugins"
        shutil.copytree(shipped("engines") / "plugins", sources)
        (sources / "build.sh").chmod(0o755)
        (sources / "capa_kernels.h").write_text(header(OPERATORS, kernels), encoding="ascii")
        (sources / "capa_kernels.s").write_text(assembly(kernels), encoding="ascii")
        (sources / "kernels").mkdir()
        for variant in dict.fromkeys(kernel.variant for kernel in kernels):
            fatbin = _fatbin([kernel for kernel in kernels if kernel.variant == variant])
            (sources / "kernels" / f"{variant}.fatbin").write_bytes(fatbin)
        sources.replace(folder)


def _fatbin(kernels: "Sequence[CompiledKernel]") -> bytes:
    """One kernel for all GPUs, as the driver takes it."""
    try:
        from cuda.bindings import nvfatbin  # pyright: ignore[reportAttributeAccessIssue]  # It has no types.
    except ImportError as error:
        raise CapaError(f"fatbins need nvidia-nvfatbin ({error}): {how_to_install('rtx')}", ExitCode.ENGINE) from error
    # Not compressed: older drivers cannot read what the newest compress.
    options = ["-64", "-compress=false"]
    handle = nvfatbin.create(options, len(options))
    try:
        for kernel in kernels:
            number = kernel.compute_capability.replace(".", "")
            name = f"{kernel.variant}.sm_{number}"
            if kernel.kind == "ptx":
                text = kernel.image + b"\0"
                nvfatbin.add_ptx(handle, text, len(text), number, name, "")
            else:
                suffix = "a" if float(kernel.compute_capability) >= 9 else ""
                nvfatbin.add_cubin(handle, kernel.image, len(kernel.image), number + suffix, name)
        data = bytearray(nvfatbin.size(handle))
        nvfatbin.get(handle, data)
        return bytes(data)
    finally:
        nvfatbin.destroy(handle)
