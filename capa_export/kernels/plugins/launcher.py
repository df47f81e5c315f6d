"""Launches compiled kernels through the CUDA driver."""

import ctypes
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from capa_export.base.errors import CapaError, ExitCode
from capa_export.base.precision import Precision
from capa_export.kernels import OPERATORS
from capa_export.kernels.compile import (
    COMPUTE_CAPABILITIES,
    CompiledKernel,
    compile_kernels,
    has_real,
    variant_name,
)
from capa_export.kernels.cuda import call
from capa_export.kernels.operator import Operator

__all__ = ["Call", "Launcher", "scratch_offsets"]

_ITEM_BYTES = {"fp32": 4, "int32": 4, "int64": 8}
_ALIGNMENT = 256
_POINTER_ALIGNMENT = 16
"""Bytes that the kernels were promised every address to be a multiple of."""
_STATIC_SHARED_BYTES = 48 * 1024
"""A kernel has to be allowed more than this."""


@dataclass(frozen=True, slots=True)
class Call:
    """A launch that lacks nothing but addresses."""

    function: Any
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    null_pointers: int
    """Behind the arguments."""
    args: tuple[str | int, ...]
    """Names of buffers and attributes, and counts."""


def scratch_offsets(operator: Operator, size: Any) -> tuple[dict[str, int], int]:
    """Where in one buffer each piece of scratch memory begins, and how many bytes that buffer has."""
    offsets: dict[str, int] = {}
    end = 0
    for name, scratch in operator.scratch(size).items():
        offsets[name] = end
        num_bytes = _ITEM_BYTES[scratch.dtype] * int(scratch.count)  # pyright: ignore[reportArgumentType]  # No symbol.
        end += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
    return offsets, end


class Launcher:
    """Loads each kernel once per CUDA context."""

    def __init__(self, kernels: Sequence[CompiledKernel] | None, operators: Sequence[Operator] = OPERATORS) -> None:
        """Take kernels.

        Args:
            kernels: of any GPUs; None compiles those of the GPU in use when the first is needed.
            operators: whose kernels are then compiled.
        """
        self._given, self._operators = kernels, operators
        self._images: dict[tuple[int, int], dict[str, CompiledKernel]] = {}
        self._functions: dict[tuple[int, str], tuple[Any, CompiledKernel]] = {}

    def prepare(self, operator: Operator, dtype: Precision, size: Any) -> list[Call]:
        """The launches that compute `operator`, in order, kernels loaded.

        Args:
            operator: what to compute.
            dtype: what `real` is.
            size: as `Operator.sizes` returns it.

        Raises:
            CapaError: the kernels were compiled for other GPUs or sizes, or the driver refused.
        """
        compiled_sizes = {name: getattr(size, name) for name in operator.compiled_sizes}
        calls: list[Call] = []
        for launch in operator.launches(size):
            variant = variant_name(launch, dtype if has_real(operator, launch) else None, compiled_sizes)
            function, kernel = self._load(variant)
            threads, args = 32 * kernel.warps, tuple(launch.args)
            calls.append(Call(function, launch.grid, threads, kernel.shared_bytes, kernel.null_pointers, args))  # pyright: ignore[reportArgumentType]  # No symbols.
        return calls

    def launch(self, operator: Operator, calls: Sequence[Call], buffers: Mapping[str, float], stream: int) -> None:
        """Launch on `stream`.

        Args:
            operator: what is computed.
            calls: what `prepare` returned.
            buffers: addresses of inputs, outputs and scratch, and values of attributes, by name.
            stream: a CUstream.

        Raises:
            CapaError: an address is not aligned as the kernels read it, or the driver refused.
        """
        of_python = {int: ctypes.c_int32, float: ctypes.c_float}
        types = {name: of_python[kind] for name, kind in operator.attributes.items()}
        for name, value in buffers.items():
            if name not in types and int(value) % _POINTER_ALIGNMENT:
                raise CapaError(f"{operator.name}: {name} lies at {int(value):#x}, no multiple of {_POINTER_ALIGNMENT}")
        for one in calls:
            if 0 in one.grid:
                continue
            values: list[float] = []
            ctypes_: list[Any] = []
            for arg in one.args:
                values.append(buffers[arg] if isinstance(arg, str) else arg)
                ctypes_.append(types.get(arg, ctypes.c_void_p) if isinstance(arg, str) else ctypes.c_int32)
            values += [0] * one.null_pointers
            ctypes_ += [ctypes.c_void_p] * one.null_pointers
            threads = (one.threads, 1, 1)
            params = (tuple(values), tuple(ctypes_))
            call("cuLaunchKernel", one.function, *one.grid, *threads, one.shared_bytes, stream, params, 0)

    def _load(self, variant: str) -> tuple[Any, CompiledKernel]:
        key = int(call("cuCtxGetCurrent")), variant
        if key not in self._functions:
            kernel = self._find(variant)
            # The driver reads PTX up to a zero.
            module = call("cuModuleLoadData", kernel.image + b"\0" * (kernel.kind == "ptx"))
            function = call("cuModuleGetFunction", module, kernel.name.encode())
            if kernel.shared_bytes > _STATIC_SHARED_BYTES:
                from cuda.bindings.driver import CUfunction_attribute as attributes

                attribute = attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                call("cuFuncSetAttribute", function, attribute, kernel.shared_bytes)
            self._functions[key] = function, kernel
        return self._functions[key]

    def _find(self, variant: str) -> CompiledKernel:
        device = call("cuCtxGetDevice")
        from cuda.bindings.driver import CUdevice_attribute as attributes

        major = call("cuDeviceGetAttribute", attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device)
        minor = call("cuDeviceGetAttribute", attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device)
        if (major, minor) not in self._images:
            self._images[major, minor] = _images(self._given, self._operators, f"{major}.{minor}")
        try:
            return self._images[major, minor][variant]
        except KeyError:
            raise CapaError(
                f"there is no kernel {variant} for compute capability {major}.{minor}", ExitCode.ENGINE
            ) from None


def _images(
    given: Sequence[CompiledKernel] | None, operators: Sequence[Operator], capability: str
) -> dict[str, CompiledKernel]:
    """By variant, what runs on such a GPU: images for it, or PTX if there are none."""
    if given is None:
        known = capability in COMPUTE_CAPABILITIES
        given = compile_kernels(operators, [capability if known else COMPUTE_CAPABILITIES[0]], ptx=not known)
    if images := {one.variant: one for one in given if one.kind == "cubin" and one.compute_capability == capability}:
        return images
    logging.getLogger(__name__).warning(
        "no kernels were compiled for compute capability %s: the driver compiles PTX, which takes a while", capability
    )
    return {one.variant: one for one in given if one.kind == "ptx"}
