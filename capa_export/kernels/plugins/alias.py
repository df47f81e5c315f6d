"""Gives TensorRT-RTX's ONNX parser the library name that its wheel lacks."""

import os
from importlib.util import find_spec
from pathlib import Path

__all__ = ["ensure_parser_library"]


def ensure_parser_library(folder: Path) -> dict[str, str]:
    """What the environment of a process needs in which the parser is to find plugins.

    For every plugin the parser opens `libtensorrt_rtx.so`, where the wheel has `libtensorrt_rtx.so.1` only, and aborts
    the process if it fails. Where libraries are looked for is settled when a process starts, so this helps none that
    runs already.

    Args:
        folder: gets a link to the library; has to stay as long as the process runs.

    Returns:
        Variables to set; none where nothing is missing.
    """
    package = find_spec("tensorrt_rtx_libs")
    libraries = Path(package.origin).parent if package and package.origin else None
    versioned = sorted(libraries.glob("libtensorrt_rtx.so.*")) if libraries else []
    if not libraries or not versioned or (libraries / "libtensorrt_rtx.so").exists():
        return {}
    (folder / "libtensorrt_rtx.so").symlink_to(versioned[-1])
    search = [str(folder), os.environ.get("LD_LIBRARY_PATH", "")]
    return {"LD_LIBRARY_PATH": os.pathsep.join(filter(None, search))}
