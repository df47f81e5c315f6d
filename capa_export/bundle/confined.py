"""Keeps a bundle inside its folder: what its files may be called, and what they may lead to."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, cast

from google.protobuf.message import DecodeError

from capa_export.base.errors import CapaError
from capa_export.base.files import is_special
from capa_export.bundle.endless import messages, require_end

__all__ = ["ONNX", "WEIGHTS_TABLE", "beside", "confined", "is_name", "references", "require_own"]

ONNX = "onnx"
"""Folder of the graphs."""
WEIGHTS_TABLE = ".weights.json"
"""Ending of the name of the table that says where an engine's weight inputs lie."""

_POINTER = "embedding.json"
_LONGEST = 255
"""Bytes of a name that every file system takes."""


def is_name(name: str) -> bool:
    """Whether a text is the plain name of a file below a folder, on every system."""
    path = PurePosixPath(name)
    return (
        name.isprintable()
        and "\\" not in name
        and path.as_posix() == name
        and not path.is_absolute()
        and not PureWindowsPath(name).drive
        and not {".", ".."} & {name, *path.parts}
        and all(len(part.encode()) <= _LONGEST for part in path.parts)
    )


def confined(folder: Path, name: str) -> Path:
    """The path of `name` below `folder`, wherever symbolic links lead; it need not exist.

    Raises:
        CapaError: it is not below it, or is neither a file nor a folder.
    """
    if not is_name(name):
        raise CapaError(f"{folder}: {name!r} is no name of a file in it; build the bundle again")
    require_own(folder / name, folder)
    return folder / name


def require_own(path: Path, folder: Path, blobs: Path | None = None) -> None:
    """Hold a path to what lies in its folder, before anything is opened.

    Args:
        path: below `folder`; it need not exist.
        folder: which no link may leave.
        blobs: a folder that links may lead to all the same, and that is no link itself.

    Raises:
        CapaError: a link on the way leads elsewhere, or the path is a pipe, a socket or a device.
    """
    real = Path(os.path.realpath(path))
    if not real.is_relative_to(os.path.realpath(folder)) and not (
        blobs and real.is_relative_to(Path(os.path.realpath(blobs.parent), blobs.name))
    ):
        raise CapaError(f"{path}: is a link that leads outside of {folder}; put what it leads to in its place (cp -rL)")
    if is_special(path):
        raise CapaError(f"{path}: is a pipe, a socket or a device; put a file in its place")


def references(path: Path) -> list[str]:
    """Paths that a file of a bundle refers to, relative to its own folder: data of graphs, weights of engines.

    No data is read. A graph's functions and nested graphs count.

    Raises:
        CapaError: the file is malformed, or says to read more than there is.
    """
    if path.suffix == ".onnx":
        found = list(_external_data(path))
    elif path.name.endswith(WEIGHTS_TABLE):
        found = list(_objects(path).values())
    elif path.name == _POINTER:
        # Where in the file is for the safetensors header to say.
        found = [{"file": _objects(path, of_text=True).get("file")}]
    else:
        return []
    for entry in found:
        _check_range(path, entry)
    return sorted({str(entry["file"]) for entry in found})


def beside(folder: Path, files: Sequence[str]) -> list[Path]:
    """What readers would find beside files of a bundle: in the folder of all graphs, and tables of engines' weights.

    Args:
        folder: of the bundle.
        files: names in it; graphs and engines among them count.
    """
    roots = {folder.joinpath(*_root(PurePosixPath(file))) for file in files if file.endswith(".onnx")}
    paths = {path for root in roots for path in root.rglob("*")}
    found = {path for path in paths if (path.is_symlink() or not path.is_dir()) and path.name[0] != "."}
    tables = ((folder / file).with_suffix(WEIGHTS_TABLE) for file in files if file.endswith(".engine"))
    return sorted({*found, *(path for path in tables if path.is_symlink() or path.exists())})


def _root(graph: PurePosixPath) -> tuple[str, ...]:
    """The folder of all graphs that one lies in, or else its own."""
    parts = graph.parent.parts
    return parts[: parts.index(ONNX) + 1] if ONNX in parts else parts


def _check_range(path: Path, entry: Mapping[str, Any]) -> None:
    file, offset, length = entry.get("file"), entry.get("offset", 0), entry.get("length", 0)
    if not isinstance(file, str) or not file.isprintable():
        raise CapaError(f"{path}: names no file where it should; build the bundle again")
    if not all(isinstance(number, int) and number >= 0 for number in (offset, length)):
        raise CapaError(f"{path}: bad offset or length in {file}; build the bundle again")
    data = path.parent / file
    if data.is_file() and offset + length > data.stat().st_size:
        raise CapaError(f"{path}: reads {file} up to byte {offset + length}, where it has ended; build again")


def _objects(path: Path, *, of_text: bool = False) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CapaError(f"{path}: cannot be read as JSON ({error}); build the bundle again") from error
    values = cast("dict[str, Any]", data).values() if isinstance(data, dict) else [None]
    if not all(isinstance(value, str if of_text else dict) for value in values):
        raise CapaError(f"{path}: is not what a build writes; build the bundle again")
    return cast("dict[str, Any]", data)


def _external_data(path: Path) -> Iterator[dict[str, Any]]:
    import onnx

    try:
        model = onnx.load(path, load_external_data=False)
    except (OSError, DecodeError) as error:
        raise CapaError(f"{path}: cannot be read as ONNX ({error}); build the bundle again") from error
    if not model.HasField("graph"):
        raise CapaError(f"{path}: cannot be read as ONNX (it holds no graph); build the bundle again")
    require_end(path, model)
    for tensor in messages(model, "TensorProto"):
        entries = [(entry.key, entry.value) for entry in tensor.external_data]
        if not entries and tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        given = dict(entries)
        if len(given) < len(entries):
            raise CapaError(f"{path}: says twice where tensor {tensor.name} lies; build the bundle again")
        numbers = {key: _number(given[key]) for key in ("offset", "length") if key in given}
        yield {"file": given.get("location"), **numbers}


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None
