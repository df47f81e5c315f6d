"""ONNX Runtime's sessions, opened once a worker for the same graph with the same weights."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capa_export.run.onnx import OnnxModel

if TYPE_CHECKING:
    import onnx

__all__ = ["opened_once"]

Connect = Callable[[OnnxModel, Path, "onnx.ModelProto | None"], Any]
_KEPT, _LARGEST = 48, 32 << 20
"""Sessions, and bytes of the weights of one that is kept."""


def opened_once(connect: Connect) -> Connect:
    """Let `OnnxModel._connected` find what it opened before: a session keeps nothing from run to run.

    Opening one takes longer than all else that most tests do with it. Where a test watches sessions being opened, they
    are; so are those on other providers.
    """
    import onnxruntime

    genuine, kept = onnxruntime.InferenceSession, OrderedDict[object, Any]()

    def connected(self: OnnxModel, path: Path, model: "onnx.ModelProto | None" = None) -> Any:
        digest = _digest(path, model) if onnxruntime.InferenceSession is genuine and self.provider == "cpu" else None
        if digest is None:
            return connect(self, path, model)
        key = digest, self.threads, self.exact, self.sliced
        session = kept.pop(key, None) or connect(self, path, model)
        kept[key] = session
        if len(kept) > _KEPT:
            kept.popitem(last=False)
        return session

    return connected


def _digest(path: Path, model: "onnx.ModelProto | None") -> bytes | None:
    """Of a graph and its weights; None where they are large, or there is none to be read."""
    import onnx
    from google.protobuf.message import DecodeError
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    try:
        graph = model or onnx.load(path, load_external_data=False)
        stored = [ExternalDataInfo(weight).location for weight in graph.graph.initializer if uses_external_data(weight)]
        files = [path.parent / location for location in sorted(set(stored))]
        if sum(file.stat().st_size for file in files) > _LARGEST:
            return None
        parts = [path.read_bytes() if model is None else model.SerializeToString(deterministic=True)]
        parts += [file.read_bytes() for file in files]
    except (OSError, DecodeError):  # Whatever is wrong with it, ONNX Runtime is to say so.
        return None
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).digest()
