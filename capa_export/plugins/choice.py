"""Which plugins an engine is built with."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from capa_export.errors import CapaError, ExitCode

__all__ = ["NO_PLUGINS", "PluginKind", "PluginWish", "Plugins", "choose_plugins"]

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


def choose_plugins(wish: PluginWish, precision: str, library: Path | None) -> Plugins:
    """What is wished for, or for `auto` the library if one is given, or Python where Triton is installed.

    Args:
        wish: as on the command line.
        precision: of the graphs.
        library: what `capa-export plugins build` wrote.

    Raises:
        CapaError: the wish cannot be met, or contradicts the library.
    """
    has_triton = find_spec("triton") is not None
    if library is not None and wish not in ("auto", "native"):
        raise CapaError(f"--plugin-library and --plugins {wish} exclude each other", ExitCode.USAGE)
    if library is not None and not library.is_file():
        raise CapaError(f"{library}: no such plugin library; `capa-export plugins build` makes one", ExitCode.USAGE)
    if wish == "native" and library is None:
        raise CapaError(
            "--plugins native needs --plugin-library FILE; `capa-export plugins build` makes it", ExitCode.USAGE
        )
    if wish == "python" and not has_triton:
        raise CapaError("--plugins python needs triton: pip install capa-export[rtx]", ExitCode.ENGINE)
    if wish != "none" and precision == "fp32":
        if wish != "auto" or library is not None:
            raise CapaError("the plugins take fp16 and bf16: build FP32 engines with --plugins none", ExitCode.USAGE)
        return Plugins("none", reason="the plugins take fp16 and bf16")
    if wish == "none":
        return NO_PLUGINS
    if library is not None:
        return Plugins("native", library.resolve())
    if has_triton:
        return Plugins("python")
    return Plugins("none", reason="triton is not installed: pip install capa-export[rtx]")
