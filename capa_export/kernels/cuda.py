"""The little of the CUDA driver that running engines takes: device memory, one stream, copies and graphs."""

import ctypes
import gc
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any
from weakref import finalize

import numpy as np

from capa_export.base.errors import CapaError, how_to_install

__all__ = [
    "Buffer",
    "Gpu",
    "Graph",
    "Memory",
    "PinnedBuffer",
    "Planes",
    "Rows",
    "Stream",
    "call",
    "enter_context",
    "require_gpu",
]


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
    return _checked(function, getattr(_driver(), function)(*args))


def _checked(function: str, result: tuple[Any, ...]) -> Any:
    status, *values = result
    if status:
        raise CapaError(f"the GPU failed: {function}: {status.name}")
    return values[0] if len(values) == 1 else tuple(values)


class _Thread(threading.local):
    """What is current in a thread."""

    driver: Any = None
    """The driver that has the first GPU's primary context there."""


_thread = _Thread()


def enter_context(driver: Any = None) -> Any:
    """Make the first GPU's primary context, which is the one that TensorRT uses, current in this thread.

    A context is current in the thread alone that made it so; whoever comes from another would be refused.

    Returns:
        The driver.

    Raises:
        CapaError: the driver refuses.
    """
    driver = driver or _driver()
    if _thread.driver is not driver:
        _checked("cuCtxSetCurrent", driver.cuCtxSetCurrent(_retained(driver)))
        _thread.driver = driver
    return driver


@cache
def _retained(driver: Any) -> Any:
    """The first GPU's primary context, kept for as long as there is a process."""
    device = _checked("cuDeviceGet", driver.cuDeviceGet(0))
    return _checked("cuDevicePrimaryCtxRetain", driver.cuDevicePrimaryCtxRetain(device))


def _release(driver: Any, function: str, handle: Any) -> None:
    """Give something back to the driver, in whichever thread its last reference went."""
    with suppress(CapaError):
        getattr(enter_context(driver), function)(handle)


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


class Memory:
    """A piece of device memory, which stays allocated for as long as it is referred to."""

    def __init__(self, address: int, num_bytes: int, owner: "Memory | None" = None) -> None:
        self.address, self.num_bytes, self._owner = address, num_bytes, owner

    def part(self, at: int, num_bytes: int) -> "Memory":
        """The bytes from `at` on."""
        assert at + num_bytes <= self.num_bytes
        return Memory(self.address + at, num_bytes, self)


class Buffer(Memory):
    """Device memory of its own, freed with the last reference to it or a part of it."""

    def __init__(self, num_bytes: int) -> None:
        """Allocate.

        Raises:
            CapaError: the GPU has not that much left.
        """
        driver = enter_context()
        # An empty tensor needs an address too.
        status, pointer = driver.cuMemAlloc(max(num_bytes, 1))
        if status:
            free, total = call("cuMemGetInfo")
            raise CapaError(
                f"the GPU has {free / 1e9:.2f} of its {total / 1e9:.2f} GB left and {num_bytes / 1e9:.2f} GB more are "
                f"needed (cuMemAlloc: {status.name}); use a smaller picture or a shorter answer"
            )
        super().__init__(int(pointer), num_bytes)
        finalize(self, _release, driver, "cuMemFree", pointer)


class PinnedBuffer:
    """Host memory that the GPU itself reads and writes, freed with the last reference to it."""

    def __init__(self, num_bytes: int) -> None:
        """Allocate.

        Raises:
            CapaError: the system does not pin that much.
        """
        driver, size = enter_context(), max(num_bytes, 1)
        pointer = call("cuMemHostAlloc", size, 0)
        self.num_bytes, self.address = num_bytes, int(pointer)
        finalize(self, _release, driver, "cuMemFreeHost", pointer)

    def view(self, at: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """The memory from byte `at` on as an array, which must not outlive it."""
        num_bytes = prod(shape) * np.dtype(dtype).itemsize
        assert at + num_bytes <= self.num_bytes
        room = (ctypes.c_uint8 * num_bytes).from_address(self.address + at)
        return np.ctypeslib.as_array(room).view(dtype).reshape(shape)


@dataclass(frozen=True, slots=True)
class Rows:
    """Where equally long rows lie in device memory, and how far apart."""

    address: int
    pitch: int
    """Bytes from the start of one row to that of the next."""


@dataclass(frozen=True, slots=True)
class Planes:
    """Where equally many equally long rows lie in each of some planes of device memory."""

    address: int
    pitch: int
    """Bytes from the start of one row to that of the next."""
    height: int
    """Pitches from the start of one plane to that of the next."""


class Graph:
    """Work that was captured once and is launched as a whole."""

    def __init__(self, graph: Any) -> None:
        try:
            self._executable = call("cuGraphInstantiate", graph, 0)
        finally:
            call("cuGraphDestroy", graph)
        finalize(self, _release, _driver(), "cuGraphExecDestroy", self._executable)

    def launch(self, stream: "Stream") -> None:
        enter_context()
        call("cuGraphLaunch", self._executable, stream.handle)


class Stream:
    """A stream of the first GPU, for whichever thread has work for it; not for two at a time."""

    def __init__(self) -> None:
        driver = enter_context()
        self.handle: Any = call("cuStreamCreate", int(driver.CUstream_flags.CU_STREAM_NON_BLOCKING))
        finalize(self, _release, driver, "cuStreamDestroy", self.handle)

    def _call(self, function: str, *args: Any) -> Any:
        enter_context()
        return call(function, *args)

    def upload(self, buffer: Memory, array: np.ndarray, *, at: int = 0) -> None:
        """Copy a contiguous array to byte `at` of a buffer; it may change as soon as this returns."""
        assert array.flags.c_contiguous and at + array.nbytes <= buffer.num_bytes
        if array.nbytes:
            self._call("cuMemcpyHtoDAsync", buffer.address + at, array.ctypes.data, array.nbytes, self.handle)
            # Where CPU and GPU share memory, the copy may still read the array itself.
            self.synchronize()

    def download(self, buffer: Memory, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """The first elements of a buffer, once all work before is done."""
        array = np.empty(shape, dtype)
        assert array.nbytes == prod(shape) * array.itemsize <= buffer.num_bytes
        if array.nbytes:
            self._call("cuMemcpyDtoHAsync", array.ctypes.data, buffer.address, array.nbytes, self.handle)
        self.synchronize()
        return array

    def copy_in(self, buffer: Memory, pinned: PinnedBuffer) -> None:
        """Copy pinned memory to a buffer, without waiting: it must not change before `synchronize`."""
        assert pinned.num_bytes <= buffer.num_bytes
        self._call("cuMemcpyHtoDAsync", buffer.address, pinned.address, pinned.num_bytes, self.handle)

    def copy_out(self, pinned: PinnedBuffer, buffer: Memory) -> None:
        """Copy a buffer to pinned memory, without waiting: it is there after `synchronize`."""
        assert pinned.num_bytes <= buffer.num_bytes
        self._call("cuMemcpyDtoHAsync", pinned.address, buffer.address, pinned.num_bytes, self.handle)

    def zero(self, buffer: Memory) -> None:
        if buffer.num_bytes:
            self._call("cuMemsetD8Async", buffer.address, 0, buffer.num_bytes, self.handle)

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
        self._call("cuMemcpy2DAsync", copy, self.handle)

    def copy_planes(self, target: Planes, source: Planes, width: int, count: int, depth: int) -> None:
        """Copy `count` rows of `width` bytes in each of `depth` planes from one place of the device to another."""
        driver = _driver()
        copy = driver.CUDA_MEMCPY3D()
        copy.srcMemoryType = copy.dstMemoryType = driver.CUmemorytype.CU_MEMORYTYPE_DEVICE
        copy.srcDevice, copy.srcPitch, copy.srcHeight = source.address, source.pitch, source.height
        copy.dstDevice, copy.dstPitch, copy.dstHeight = target.address, target.pitch, target.height
        copy.WidthInBytes, copy.Height, copy.Depth = width, count, depth
        self._call("cuMemcpy3DAsync", copy, self.handle)

    def synchronize(self) -> None:
        self._call("cuStreamSynchronize", self.handle)

    def capture(self, work: Callable[[], None]) -> Graph:
        """The graph of what `work` puts on this stream; nothing of it runs yet. `work` neither allocates nor waits.

        Raises:
            CapaError: some of it cannot be captured.
        """
        mode = _driver().CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        enter_context()
        # What is freed meanwhile, as a collection may do at any line, ends a capture.
        collects = gc.isenabled()
        gc.disable()
        try:
            call("cuStreamBeginCapture", self.handle, mode)
            work()
        except BaseException:
            # Also where the user interrupts, the stream must leave capture mode; what was captured is of no use.
            with suppress(CapaError):
                call("cuGraphDestroy", call("cuStreamEndCapture", self.handle))
            raise
        finally:
            if collects:
                gc.enable()
        return Graph(call("cuStreamEndCapture", self.handle))
