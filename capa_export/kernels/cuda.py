"""The little of the CUDA driver that running engines takes: device memory, one stream, copies and graphs."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any
from weakref import finalize

import numpy as np

from capa_export.base.errors import CapaError, how_to_install

__all__ = ["Buffer", "Gpu", "Graph", "Rows", "Stream", "call", "require_gpu"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """Facts about the first GPU."""

    name: str
    compute_capability: str
    """As `8.9`."""
    memory_bytes: int
    cuda: str
    """Newest CUDA version that the driver supports, as `13.0`."""


@cache
def _driver() -> Any:
    try:
        from cuda.bindings import driver  # pyright: ignore[reportAttributeAccessIssue]  # Compiled, without stubs.
    except ImportError as error:
        raise CapaError(f"cuda-bindings is not installed: {how_to_install('rtx')}") from error
    return driver


def call(function: str, *args: Any) -> Any:
    """What a function of the driver returns, without its status.

    Raises:
        CapaError: the status is not success.
    """
    status, *values = getattr(_driver(), function)(*args)
    if status:
        raise CapaError(f"the GPU failed: {function}: {status.name}")
    return values[0] if len(values) == 1 else tuple(values)


def require_gpu() -> Gpu:
    """The GPU that engines will run on.

    Raises:
        CapaError: there is none.
    """
    driver = _driver()
    try:
        (status,) = driver.cuInit(0)
    except RuntimeError as error:  # What the bindings raise where there is no libcuda.
        raise CapaError("no GPU: the NVIDIA driver (libcuda) is not installed; run without --engine") from error
    if status:
        raise CapaError(f"no GPU: the NVIDIA driver says {status.name}; run without --engine")
    if not call("cuDeviceGetCount"):
        raise CapaError("no GPU: the NVIDIA driver finds no device; run without --engine")
    device = call("cuDeviceGet", 0)
    attribute = driver.CUdevice_attribute
    major = call("cuDeviceGetAttribute", attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device)
    minor = call("cuDeviceGetAttribute", attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device)
    version = call("cuDriverGetVersion")
    return Gpu(
        name=call("cuDeviceGetName", 256, device).split(b"\0")[0].decode(),
        compute_capability=f"{major}.{minor}",
        memory_bytes=call("cuDeviceTotalMem", device),
        cuda=f"{version // 1000}.{version % 1000 // 10}",
    )


class Buffer:
    """Device memory, freed with the last reference to it."""

    def __init__(self, num_bytes: int) -> None:
        """Allocate.

        Raises:
            CapaError: the GPU has not that much left.
        """
        self.num_bytes = num_bytes
        # An empty tensor needs an address too.
        status, pointer = _driver().cuMemAlloc(max(num_bytes, 1))
        if status:
            free, total = call("cuMemGetInfo")
            raise CapaError(
                f"the GPU has {free / 1e9:.2f} of its {total / 1e9:.2f} GB left and {num_bytes / 1e9:.2f} GB more are "
                f"needed (cuMemAlloc: {status.name}); use a smaller picture or a shorter answer"
            )
        self.address = int(pointer)
        finalize(self, _driver().cuMemFree, pointer)


@dataclass(frozen=True, slots=True)
class Rows:
    """Where equally long rows lie in device memory, and how far apart."""

    address: int
    pitch: int
    """Bytes from the start of one row to that of the next."""


class Graph:
    """Work that was captured once and is launched as a whole."""

    def __init__(self, graph: Any) -> None:
        try:
            self._executable = call("cuGraphInstantiate", graph, 0)
        finally:
            call("cuGraphDestroy", graph)
        finalize(self, _driver().cuGraphExecDestroy, self._executable)

    def launch(self, stream: "Stream") -> None:
        call("cuGraphLaunch", self._executable, stream.handle)


class Stream:
    """A stream of the first GPU's primary context, which is the one that TensorRT uses."""

    def __init__(self) -> None:
        context = call("cuDevicePrimaryCtxRetain", call("cuDeviceGet", 0))
        call("cuCtxSetCurrent", context)
        self.handle: Any = call("cuStreamCreate", int(_driver().CUstream_flags.CU_STREAM_NON_BLOCKING))
        finalize(self, _driver().cuStreamDestroy, self.handle)

    def upload(self, buffer: Buffer, array: np.ndarray, *, at: int = 0) -> None:
        """Copy a contiguous array to byte `at` of a buffer; it may change as soon as this returns."""
        assert array.flags.c_contiguous and at + array.nbytes <= buffer.num_bytes
        if array.nbytes:
            call("cuMemcpyHtoDAsync", buffer.address + at, array.ctypes.data, array.nbytes, self.handle)
            # Where CPU and GPU share memory, the copy may still read the array itself.
            self.synchronize()

    def download(self, buffer: Buffer, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """The first elements of a buffer, once all work before is done."""
        array = np.empty(shape, dtype)
        assert array.nbytes == prod(shape) * array.itemsize <= buffer.num_bytes
        if array.nbytes:
            call("cuMemcpyDtoHAsync", array.ctypes.data, buffer.address, array.nbytes, self.handle)
        self.synchronize()
        return array

    def zero(self, buffer: Buffer) -> None:
        if buffer.num_bytes:
            call("cuMemsetD8Async", buffer.address, 0, buffer.num_bytes, self.handle)

    def copy_rows(self, target: Rows, source: Rows, width: int, count: int) -> None:
        """Copy `count` rows of `width` bytes from one place of the device to another."""
        if not width or not count:
            return
        driver = _driver()
        copy = driver.CUDA_MEMCPY2D()
        copy.srcMemoryType = copy.dstMemoryType = driver.CUmemorytype.CU_MEMORYTYPE_DEVICE
        copy.srcDevice, copy.srcPitch = source.address, source.pitch
        copy.dstDevice, copy.dstPitch = target.address, target.pitch
        copy.WidthInBytes, copy.Height = width, count
        call("cuMemcpy2DAsync", copy, self.handle)

    def synchronize(self) -> None:
        call("cuStreamSynchronize", self.handle)

    def capture(self, work: Callable[[], None]) -> Graph:
        """The graph of what `work` puts on this stream; nothing of it runs yet.

        Raises:
            CapaError: some of it cannot be captured.
        """
        call("cuStreamBeginCapture", self.handle, _driver().CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
        try:
            work()
        except CapaError:
            # The stream must leave capture mode; what was captured up to here, if anything, is of no use.
            with suppress(CapaError):
                call("cuGraphDestroy", call("cuStreamEndCapture", self.handle))
            raise
        return Graph(call("cuStreamEndCapture", self.handle))
