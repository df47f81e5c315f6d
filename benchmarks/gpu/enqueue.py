"""Runs plugins of the C++ library as TensorRT does, on tensors at addresses that the caller gives."""

import ctypes
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

__all__ = ["NativePlugins"]

_HERE = Path(__file__).parent
_STUBS = _HERE.parents[1] / "engines" / "plugins" / "stubs"
_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 7, torch.int64: 8}
"""nvinfer1::DataType."""


class _TensorAt(ctypes.Structure):
    _fields_ = (
        *(("type", ctypes.c_int), ("rank", ctypes.c_int)),
        *(("dims", ctypes.c_long * 5), ("address", ctypes.c_void_p)),
    )


class NativePlugins:
    """The plugins of a library, and what calls them.

    Args:
        library: compiled, with kernels for the GPU.
        caller: what `build_caller` writes.
    """

    def __init__(self, library: Path, caller: Path) -> None:
        self._library, self._caller = library, ctypes.CDLL(str(caller))

    @staticmethod
    def build_caller(folder: Path, include: Path) -> Path:
        """Compile what stands in for TensorRT, against its headers in `include`."""
        path = folder / "plugin.so"
        flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{_STUBS}", "-isystem", include]
        command = ["g++", *flags, _HERE / "plugin.cpp", "-o", path, "-ldl"]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        return path

    def run(
        self,
        operator: Any,
        tensors: Sequence[tuple[torch.dtype, Sequence[int], int]],
        attributes: Mapping[str, float],
        allocate: Callable[[int], int],
        stream: int,
    ) -> None:
        """Configure a plugin for these tensors, and enqueue it.

        Args:
            operator: which of them.
            tensors: type, shape with batch axis, and address of each input that lies on the device, then each output.
            attributes: values of the operator's attributes, of which there is one at most.
            allocate: gives as many bytes for the workspace.
            stream: that it runs on.

        Raises:
            AssertionError: the plugin refuses.
        """
        device = [one for name, one in operator.inputs.items() if name not in operator.value_inputs]
        specs = [*device, *operator.outputs.values()]
        described: list[_TensorAt] = []
        for spec, (dtype, shape, address) in zip(specs, tensors, strict=True):
            dims = shape[len(spec.shape) - len(spec.graph_shape) :]
            described.append(_TensorAt(_TYPES[dtype], len(dims), (ctypes.c_long * 5)(*dims), address))
        name, value = next(iter(attributes.items()), (None, 0))
        # Kept until the call is over.
        allocator = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t)(allocate)
        status = self._caller.run_plugin(
            *(str(self._library).encode(), operator.name.encode(), name and name.encode()),
            *(int(isinstance(value, float)), ctypes.c_double(value)),
            *((_TensorAt * len(described))(*described), len(device), len(operator.outputs)),
            *(allocator, ctypes.c_void_p(stream)),
        )
        assert status == 0, f"{operator.name}: {status}"
