"""A stand-in for the CUDA driver: it keeps what it is asked, and refuses what the driver refuses.

It computes nothing. Every call must have as many arguments as the real driver's and come from a thread in which a
context is current; every copy must lie within memory that is allocated at that moment; and while a stream is captured,
nothing may be allocated, freed, loaded or waited for, and no host memory be copied that is not pinned.
"""

import ctypes
import inspect
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from cuda.bindings import driver as real

from capa_export.kernels.compile import CompiledKernel, compile_kernels
from capa_export.kernels.operator import Operator

__all__ = ["FakeDriver", "compile_from_ptx", "has_driver"]

_OK = real.CUresult.CUDA_SUCCESS
_ADDRESS_STEP = 1 << 40
_WITHOUT_CONTEXT = (
    "cuInit",
    "cuDeviceGet",
    "cuDriverGetVersion",
    "cuDeviceTotalMem",
    "cuDevicePrimaryCtxRetain",
    "cuCtx",
)
_NOT_IN_CAPTURE = ("cuMemAlloc", "cuMemFree", "cuMemHostAlloc", "cuModuleLoad", "cuStreamSynchronize")


def _is_captured(name: str) -> bool:
    return name.endswith("Async") or name == "cuLaunchKernel"


class FakeDriver:
    """The functions of `cuda.bindings.driver` that are used, on a GPU of `memory` bytes."""

    def __init__(self, *, capability: tuple[int, int] = (8, 9), memory: int = 1 << 30) -> None:
        self.capability, self.memory = capability, memory
        self.calls: list[tuple[Any, ...]] = []
        """Name and arguments, in order; what TensorRT does is among them."""
        self.buffers: dict[int, int] = {}
        """Bytes by address of what is allocated."""
        self.fails: dict[str, Any] = {}
        """Status by function, where it is not success."""
        self.pinned: dict[int, np.ndarray] = {}
        """Host memory by the address that it was given out with."""
        self.current: set[int] = set()
        """Threads in which the context is current."""
        self.capturing: list[tuple[Any, ...]] | None = None
        self.invalidated = False
        """Whether something came between that a capture does not survive."""
        self.graphs: dict[str, list[tuple[Any, ...]]] = {}
        self._next = _ADDRESS_STEP

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            return getattr(real, name)
        implementation = getattr(self, f"_{name}", None)
        signature = inspect.signature(getattr(real, name))

        def function(*args: Any) -> tuple[Any, ...]:
            signature.bind(*args)
            captured = self.capturing is not None and _is_captured(name)
            self.record(name, *args)
            if status := self.fails.get(name) or self.refusal(name):
                # As the bindings do; functions that return nothing have the status alone.
                returns = any(part in name for part in ("Create", "Instantiate", "Alloc"))
                return (status, None) if returns else (status,)
            if captured:
                # It runs when the graph does.
                return (_OK,)
            return (_OK, *(implementation(*args) if implementation else ()))

        return function

    def refusal(self, name: str) -> Any:
        """The status of a call that the driver would refuse at this moment."""
        if not name.startswith(_WITHOUT_CONTEXT) and threading.get_ident() not in self.current:
            return real.CUresult.CUDA_ERROR_INVALID_CONTEXT
        if self.capturing is not None and name.startswith(_NOT_IN_CAPTURE):
            self.invalidated = True
            return real.CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
        return None

    def is_pinned(self, address: int, num_bytes: int) -> bool:
        return any(start <= address and address + num_bytes <= start + len(one) for start, one in self.pinned.items())

    def record(self, name: str, *args: Any) -> None:
        call = (name, *args)
        self.calls.append(call)
        if self.capturing is not None and _is_captured(name):
            self.capturing.append(call)

    def named(self, *names: str) -> list[tuple[Any, ...]]:
        return [call for call in self.calls if call[0] in names]

    def check(self, address: int, num_bytes: int) -> None:
        """That these bytes are allocated."""
        holders = [start for start, size in self.buffers.items() if start <= address <= start + size]
        assert holders, f"{address:#x} is not allocated"
        assert address + num_bytes <= holders[0] + self.buffers[holders[0]], "past the end of a buffer"

    def _cuDeviceGetCount(self) -> tuple[int]:
        return (1,)

    def _cuDeviceGet(self, ordinal: int) -> tuple[int]:
        return (ordinal,)

    def _cuDeviceGetName(self, length: int, device: int) -> tuple[bytes]:
        return (b"Fake".ljust(length, b"\0"),)

    def _cuDeviceGetAttribute(self, attribute: Any, device: int) -> tuple[int]:
        return (self.capability["MINOR" in attribute.name],)

    def _cuDeviceTotalMem(self, device: int) -> tuple[int]:
        return (self.memory,)

    def _cuMemGetInfo(self) -> tuple[int, int]:
        return self.memory - sum(self.buffers.values()), self.memory

    def _cuDriverGetVersion(self) -> tuple[int]:
        return (13010,)

    def _cuDevicePrimaryCtxRetain(self, device: int) -> tuple[str]:
        return ("context",)

    def _cuCtxSetCurrent(self, context: str) -> tuple[()]:
        assert context == "context"
        self.current.add(threading.get_ident())
        return ()

    def _cuCtxGetCurrent(self) -> tuple[int]:
        return (1,)

    def _cuCtxGetDevice(self) -> tuple[int]:
        return (0,)

    def _cuModuleLoadData(self, image: bytes) -> tuple[bytes]:
        return (image,)

    def _cuModuleGetFunction(self, module: bytes, name: bytes) -> tuple[Any]:
        return ((name.decode(), module),)

    def _cuLaunchKernel(self, function: Any, *args: Any) -> tuple[()]:
        """Compute what a kernel does; nothing here."""
        return ()

    def _cuMemHostAlloc(self, num_bytes: int, flags: int) -> tuple[int]:
        room = np.zeros(num_bytes, np.uint8)
        self.pinned[room.ctypes.data] = room
        return (room.ctypes.data,)

    def _cuMemFreeHost(self, address: int) -> tuple[()]:
        del self.pinned[address]
        return ()

    def _cuStreamCreate(self, flags: int) -> tuple[int]:
        return (77,)

    def cuMemAlloc(self, num_bytes: int) -> tuple[Any, ...]:
        self.record("cuMemAlloc", num_bytes)
        if status := self.refusal("cuMemAlloc"):
            return status, None
        if sum(self.buffers.values()) + num_bytes > self.memory:
            return real.CUresult.CUDA_ERROR_OUT_OF_MEMORY, None
        self._next += _ADDRESS_STEP
        self.buffers[self._next] = num_bytes
        return _OK, self._next

    def _cuMemFree(self, address: int) -> tuple[()]:
        del self.buffers[address]
        return ()

    def _cuMemcpyHtoDAsync(self, target: int, source: int, num_bytes: int, stream: Any) -> tuple[()]:
        self.check(target, num_bytes)
        return ()

    def _cuMemcpyDtoHAsync(self, target: int, source: int, num_bytes: int, stream: Any) -> tuple[()]:
        self.check(source, num_bytes)
        ctypes.memset(target, 0, num_bytes)
        return ()

    def _cuMemsetD8Async(self, address: int, value: int, num_bytes: int, stream: Any) -> tuple[()]:
        self.check(address, num_bytes)
        return ()

    def _cuMemcpy2DAsync(self, copy: Any, stream: Any) -> tuple[()]:
        for address, pitch in ((int(copy.srcDevice), copy.srcPitch), (int(copy.dstDevice), copy.dstPitch)):
            assert copy.WidthInBytes <= pitch
            self.check(address, (copy.Height - 1) * pitch + copy.WidthInBytes)
        return ()

    def _cuMemcpy3DAsync(self, copy: Any, stream: Any) -> tuple[()]:
        sides = ((copy.srcDevice, copy.srcPitch, copy.srcHeight), (copy.dstDevice, copy.dstPitch, copy.dstHeight))
        for address, pitch, height in sides:
            assert copy.WidthInBytes <= pitch and copy.Height <= height
            rows = (copy.Depth - 1) * height + copy.Height - 1
            self.check(int(address), rows * pitch + copy.WidthInBytes)
        return ()

    def _cuStreamBeginCapture(self, stream: Any, mode: Any) -> tuple[()]:
        assert self.capturing is None
        self.capturing, self.invalidated = [], False
        return ()

    def cuStreamEndCapture(self, stream: Any) -> tuple[Any, ...]:
        self.record("cuStreamEndCapture", stream)
        graph = f"graph{len(self.graphs)}"
        assert self.capturing is not None
        captured, self.capturing = self.capturing, None
        lost = real.CUresult.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED if self.invalidated else _OK
        if failure := self.fails.get("cuStreamEndCapture", lost):
            return failure, None
        for name, *args in captured:
            host = {"cuMemcpyHtoDAsync": 1, "cuMemcpyDtoHAsync": 0}.get(name)
            assert host is None or self.is_pinned(args[host], args[2]), f"{name} of memory that is not pinned"
        self.graphs[graph] = captured
        return _OK, graph

    def _cuGraphInstantiate(self, graph: str, flags: int) -> tuple[str]:
        return (graph,)

    def _cuGraphLaunch(self, graph: str, stream: Any) -> tuple[()]:
        for name, *args in self.graphs[graph]:
            if name == "executeAsync":
                self.execute(*args)
            else:
                getattr(self, f"_{name}")(*args)
        return ()

    def execute(self, engine: str, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        """Compute what an engine does; nothing here."""


def compile_from_ptx(operators: Sequence[Operator], capabilities: Sequence[str], **_: Any) -> list[CompiledKernel]:
    """What stands for kernels of the GPUs: their PTX."""
    kernels = compile_kernels(operators, ["8.0"], ptx=True)
    return [
        replace(one, kind="cubin", compute_capability=capability)
        for one in kernels
        for capability in capabilities
        if one.kind == "ptx"
    ]


def has_driver() -> bool:
    """Whether this machine has the real one."""
    try:
        real.cuInit(0)
    except RuntimeError:
        return False
    return True
