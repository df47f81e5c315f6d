"""A stand-in for the GPU that computes: ONNX Runtime runs the graphs of engines, an interpreter the kernels' PTX."""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime

from capa_export.passes.cache_blocks import CacheBlocksPass
from capa_export.passes.join_decode import JoinDecodePass
from capa_export.trt.graphs import GRAPHS, JOINED, served_graphs
from tests.fake_driver import FakeDriver
from tests.kernels.ptx.launch import launch
from tests.kernels.ptx.memory import GlobalMemory
from tests.kernels.ptx.parse import Kernel, parse

__all__ = ["ComputingDriver"]


class ComputingDriver(FakeDriver):
    """A GPU whose memory holds what is copied to it, and whose engines are graphs on ONNX Runtime."""

    def __init__(self) -> None:
        super().__init__()
        self.data: dict[int, np.ndarray] = {}
        self.sessions: dict[str, Any] = {}

    def open(self, onnx: Path, *, joined: bool = False) -> None:
        """Take the graphs of a bundle, of which prefill may be decode as well."""
        for engine, (file, *others) in served_graphs(JOINED if joined else GRAPHS).items():
            model = ir.load(onnx / file)
            (JoinDecodePass() if others else CacheBlocksPass())(model)
            place = (onnx / file).with_suffix(".engine.onnx")
            ir.save(model, place)
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            self.sessions[engine] = onnxruntime.InferenceSession(str(place), options, ["CPUExecutionProvider"])

    def at(self, address: int, num_bytes: int) -> np.ndarray:
        """The bytes at an address."""
        self.check(address, num_bytes)
        start = max(start for start in self.buffers if start <= address)
        # What nobody wrote is no number.
        room = self.data.setdefault(start, np.full(self.buffers[start], 0xFF, np.uint8))
        return room[address - start :][:num_bytes]

    def _cuMemFree(self, address: int) -> tuple[()]:
        self.data.pop(address, None)
        return super()._cuMemFree(address)

    def _cuMemcpyHtoDAsync(self, target: int, source: int, num_bytes: int, stream: Any) -> tuple[()]:
        self.at(target, num_bytes)[:] = np.frombuffer(ctypes.string_at(source, num_bytes), np.uint8)
        return ()

    def _cuMemcpyDtoHAsync(self, target: int, source: int, num_bytes: int, stream: Any) -> tuple[()]:
        ctypes.memmove(target, self.at(source, num_bytes).tobytes(), num_bytes)
        return ()

    def _cuMemsetD8Async(self, address: int, value: int, num_bytes: int, stream: Any) -> tuple[()]:
        self.at(address, num_bytes)[:] = value
        return ()

    def _cuMemcpy2DAsync(self, copy: Any, stream: Any) -> tuple[()]:
        for row in range(copy.Height):
            self._move(copy, row * copy.srcPitch, row * copy.dstPitch)
        return super()._cuMemcpy2DAsync(copy, stream)

    def _cuMemcpy3DAsync(self, copy: Any, stream: Any) -> tuple[()]:
        for plane in range(copy.Depth):
            for row in range(copy.Height):
                source, target = (plane * height + row for height in (copy.srcHeight, copy.dstHeight))
                self._move(copy, source * copy.srcPitch, target * copy.dstPitch)
        return super()._cuMemcpy3DAsync(copy, stream)

    def _move(self, copy: Any, source: int, target: int) -> None:
        width = copy.WidthInBytes
        self.at(int(copy.dstDevice) + target, width)[:] = self.at(int(copy.srcDevice) + source, width)

    def execute(self, engine: str, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        session, feed = self.sessions[engine], {}
        for entry in session.get_inputs():
            dtype = {"tensor(float16)": np.float16, "tensor(int64)": np.int64, "tensor(float)": np.float32}[entry.type]
            shape, address = shapes.get(entry.name, tuple(entry.shape)), addresses[entry.name]
            num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
            on_device = any(start <= address < start + size for start, size in self.buffers.items())
            data = self.at(address, num_bytes).tobytes() if on_device else ctypes.string_at(address, num_bytes)
            feed[entry.name] = np.frombuffer(data, dtype).reshape(shape)
        names = [entry.name for entry in session.get_outputs()]
        for name, value in zip(names, session.run(names, feed), strict=True):
            self.at(addresses[name], value.nbytes)[:] = np.ascontiguousarray(value).view(np.uint8).reshape(-1)

    def _cuLaunchKernel(self, function: Any, *args: Any) -> tuple[()]:
        """Run it from its PTX, on what lies in the device's memory and in pinned memory."""
        *grid, threads, _, _, shared_bytes, _, (values, types), _ = args
        name, image = function
        kernel = _parsed(image)
        assert (kernel.name, kernel.threads) == (name, threads)
        memory = GlobalMemory()
        for address, size in self.buffers.items():
            memory.add(f"{address:#x}", self.at(address, size), address=address)
        for address, data in self.pinned.items():
            memory.add(f"{address:#x}", data, address=address)
        given = [kind(value) for value, kind in zip(values, types, strict=True)]
        launch(kernel, memory, [bytes(one) for one in given], grid, shared_bytes)
        return ()


@cache
def _parsed(image: bytes) -> Kernel:
    return parse(image.decode())
