"""Which plugins an engine is built with."""

import platform
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from capa_export.base.dims import DecoderDims
from capa_export.base.errors import CapaError, ExitCode, how_to_install

__all__ = ["HEAD_SIZES", "NO_PLUGINS", "PluginKind", "PluginWish", "Plugins", "choose_device_plugins", "choose_plugins"]

HEAD_SIZES = (32, 64, 80, 96, 128)
"""What there are kernels for."""

_ELF_MACHINES = {"x86_64": 62, "aarch64": 183}
"""What the header of a library calls the CPU."""

PluginKind = Literal["python", "native", "none"]
PluginWish = Literal["auto", "python", "native", "none"]


@dataclass(frozen=True, slots=True)
class Plugins:
    """What computes the CAPA nodes of an engine."""

    kind: PluginKind
    """Kernels launched from Python; kernels in a library; or the function bodies, by TensorRT's own layers."""
    library: Path | None = None
    """The library, where they are native."""
    reason: str = ""
    """Why there are none, where it was left open."""


NO_PLUGINS = Plugins("none")


def choose_plugins(
    wish: PluginWish, precision: str, decoder: DecoderDims, library: Path | None, *, extra: str = "rtx"
) -> Plugins:
    """What is wished for, or for `auto` the library if one is given, or Python where Triton is installed.

    Args:
        wish: as on the command line.
        precision: of the graphs.
        decoder: whose nodes they compute.
        library: what `capa-export plugins build` wrote.
        extra: of this package, which brings Triton along with the runtime.

    Raises:
        CapaError: the wish cannot be met, or contradicts the library.
    """
    if library is not None and wish not in ("auto", "native"):
        raise CapaError(f"--plugin-library and --plugins {wish} exclude each other", ExitCode.USAGE)
    if library is not None:
        _check_library(library)
    if wish == "native" and library is None:
        raise CapaError(
            "--plugins native needs --plugin-library FILE; `capa-export plugins build` makes it", ExitCode.USAGE
        )
    if wish == "none":
        return NO_PLUGINS
    if unfit := _unfit(precision, decoder):
        if wish == "auto" and library is None:
            return Plugins("none", reason=unfit)
        raise CapaError(f"{unfit}: build these engines with --plugins none", ExitCode.USAGE)
    if library is not None:
        return Plugins("native", library.resolve())
    if find_spec("triton") is not None:
        return Plugins("python")
    if wish == "python":
        raise CapaError(f"--plugins python needs triton: {how_to_install(extra)}", ExitCode.ENGINE)
    return Plugins("none", reason=f"triton is not installed: {how_to_install(extra)}")


def _check_library(path: Path) -> None:
    """Refuse what TensorRT would refuse without a reason, long after."""
    if not path.is_file():
        raise CapaError(f"{path}: no such plugin library; `capa-export plugins build` makes one", ExitCode.USAGE)
    with path.open("rb") as file:
        head = file.read(20)
    machine = int.from_bytes(head[18:20], "little") if head[:4] == b"\x7fELF" else None
    if machine is None:
        raise CapaError(f"{path}: is no library; `capa-export plugins build` makes one", ExitCode.USAGE)
    if machine != _ELF_MACHINES.get(platform.machine()):
        names = {number: name for name, number in _ELF_MACHINES.items()}
        raise CapaError(
            f"{path}: is for {names.get(machine, 'another CPU')}, and this machine is {platform.machine()}; "
            f"build one with `capa-export plugins build --arch {platform.machine()}`",
            ExitCode.USAGE,
        )


def choose_device_plugins(wish: PluginWish, precision: str, decoder: DecoderDims, *, python: bool = False) -> Plugins:
    """What is built with from a kit: native plugins whose sources are in it, or none; arguments as above.

    Args:
        wish: as on the command line.
        precision: of the graphs.
        decoder: whose nodes they compute.
        python: whether it is built here, where those of Python are.

    Raises:
        CapaError: the wish cannot be met.
    """
    if python and wish in ("auto", "python"):
        return choose_plugins(wish, precision, decoder, None, extra="tensorrt")
    if wish == "python":
        raise CapaError("--plugins python: a device builds with native plugins, or none", ExitCode.USAGE)
    if wish == "native" and find_spec("triton") is None:
        raise CapaError(f"--plugins native needs triton for the kernels: {how_to_install('rtx')}", ExitCode.ENGINE)
    chosen = choose_plugins("auto" if wish == "native" else wish, precision, decoder, None)
    if wish == "native" and chosen.reason:
        raise CapaError(f"{chosen.reason}: build these engines with --plugins none", ExitCode.USAGE)
    return replace(chosen, kind="none" if chosen.kind == "none" else "native")


def _unfit(precision: str, decoder: DecoderDims) -> str:
    """Why there are no kernels for a model, if there are none."""
    if precision == "fp32":
        return "plugins are for graphs in fp16 and bf16"
    if decoder.head_dim not in HEAD_SIZES:
        return f"the plugins have no kernels for head size {decoder.head_dim}"
    return f"the plugins need a hidden size in sixteens, not {decoder.hidden_size}" if decoder.hidden_size % 16 else ""
