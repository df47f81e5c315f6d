"""One engine executed on the GPU: its context, its tensors at their addresses, and the kernels compiled for it."""

import os
from collections.abc import Mapping
from hashlib import sha256
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from capa_export.base.files import replacing, user_cache
from capa_export.base.progress import say
from capa_export.kernels.cuda import Buffer, Memory, PinnedBuffer, Stream, enter_context

if TYPE_CHECKING:
    from capa_export.run.engine import LoadedEngine

__all__ = ["ALIGNMENT", "Arena", "Execution", "KernelCache", "PinnedInputs"]

ALIGNMENT = 256
"""Bytes that every address is a multiple of, as TensorRT asks."""


class KernelCache:
    """The kernels that TensorRT-RTX compiled for an engine on this GPU, in a file of the user's cache.

    Without it every process compiles them again, and once more for each new shape. It holds code, and no digest of the
    bundle covers it: one that came with a bundle would be somebody else's.

    Args:
        engine: file of the engine.
        cache: TensorRT-RTX's IRuntimeCache.
    """

    def __init__(self, engine: Path, cache: Any) -> None:
        name = sha256(os.fsencode(os.path.realpath(engine))).hexdigest()
        self.path, self.cache = user_cache("engine-kernels") / name, cache
        self._known = b""
        try:
            stored = self.path.read_bytes()
            if self.path.stat().st_mtime_ns < engine.stat().st_mtime_ns:
                # Of an engine that was there before.
                return
        except OSError:
            return
        # One of another GPU, driver or version is refused, and written anew.
        if cache.deserialize(stored):
            self._known = sha256(stored).digest()

    def save(self) -> None:
        """Write what is new; a cache that cannot be written has none."""
        compiled = self.cache.serialize()
        if compiled is None or sha256(compiled).digest() == self._known:
            return
        self._known = sha256(compiled).digest()
        try:
            with replacing(self.path) as file:
                file.write(compiled)
        except OSError as error:
            say(f"{self.path}: compiled kernels are not kept for the next time ({error.strerror})")


class Execution:
    """An execution context of an engine, with the memory of its inputs and outputs.

    Args:
        engine: what is executed.
        context: TensorRT's IExecutionContext, new.
        stream: that everything runs on.
        activations: memory for what is between inputs and outputs; executions on one stream may share it.

    Raises:
        CapaError: TensorRT refuses.
    """

    def __init__(self, engine: "LoadedEngine", context: Any, stream: Stream, activations: Buffer) -> None:
        self.engine, self._context, self._stream = engine, context, stream
        self._activations = activations
        self._values: dict[str, np.ndarray] = {}
        """Inputs that the engine reads from host memory, which must stay where they are."""
        # Only an engine's first context has a profile by itself; and shapes are set within a profile.
        if not context.set_optimization_profile_async(engine.profile, int(stream.handle)):
            raise engine.failure("does not take its own profile")
        assert activations.num_bytes >= engine.activation_bytes and not activations.address % ALIGNMENT
        context.set_device_memory(activations.address, activations.num_bytes)
        for name, buffer in engine.weights.items():
            self._set_address(name, buffer.address)
        self._bind_blanks()

    def _bind_blanks(self) -> None:
        """Let what the graph has not be read as zeros, all from one place, and be written to where nobody reads."""
        engine = self.engine
        inputs, outputs = engine.blank_inputs, engine.blank_outputs
        on_device = {name: shape for name, shape in (inputs | outputs).items() if name not in engine.on_host}
        if not inputs:
            return
        room = max(engine.num_bytes(name, shape) for name, shape in on_device.items())
        self._zeros, self._unread = Buffer(room), Buffer(room)
        self._stream.zero(self._zeros)
        for name, shape in inputs.items():
            if not self._context.set_input_shape(name, shape):
                raise engine.failure(f"does not take {name} of shape {shape}")
        for name in inputs.keys() & engine.on_host:
            self._values[name] = _aligned(np.zeros(inputs[name], engine.dtypes[name]))
            self._set_address(name, self._values[name].ctypes.data)
        for name in on_device:
            self._set_address(name, (self._zeros if name in inputs else self._unread).address)

    def bind(
        self,
        feed: Mapping[str, np.ndarray],
        sizes: Mapping[str, int],
        given: Mapping[str, Memory] = MappingProxyType({}),
    ) -> dict[str, Memory]:
        """Set every shape and address; returns the memory of all inputs and outputs on the device.

        Args:
            feed: inputs; those that lie on the device are only given memory, not uploaded.
            sizes: of the symbolic dimensions that the shapes of `feed` do not show.
            given: memory that some tensors already have.

        Raises:
            CapaError: TensorRT refuses, or the GPU has no room.
        """
        engine, context = self.engine, self._context
        engine.runtime.forget()
        enter_context()
        sizes = {**engine.sizes({name: feed[name] for name in engine.inputs if name in feed}), **sizes}
        shapes = {name: engine.shape(name, sizes) for name in (*engine.inputs, *engine.outputs)}
        for name in engine.inputs:
            assert name not in feed or feed[name].dtype == engine.dtypes[name], name
            shape = engine.bound_shape(name, shapes[name])
            if not context.set_input_shape(name, shape):
                raise engine.failure(f"does not take {name} of shape {shape}")
            if name in engine.on_host:
                self._values[name] = _aligned(feed[name])
                self._set_address(name, self._values[name].ctypes.data)
        self._infer_shapes()
        buffers: dict[str, Memory] = {}
        for name, shape in shapes.items():
            if name in engine.on_host:
                continue
            # A shape that TensorRT takes for larger would be written past the end.
            known, wanted = tuple(context.get_tensor_shape(name)), engine.bound_shape(name, shape)
            assert all(size in (-1, length) for size, length in zip(known, wanted, strict=True)), (name, known, shape)
            buffers[name] = given.get(name) or Buffer(engine.num_bytes(name, shape))
            assert buffers[name].num_bytes >= engine.num_bytes(name, shape), name
            self._set_address(name, buffers[name].address)
        return buffers

    def _infer_shapes(self) -> None:
        try:
            missing = self._context.infer_shapes()
        except RuntimeError as error:
            raise self.engine.failure("does not take these shapes") from error
        assert not missing, missing

    def _set_address(self, name: str, address: int) -> None:
        if not self._context.set_tensor_address(name, address):
            raise self.engine.failure(f"does not take the memory of {name}")

    def run(self, feed: Mapping[str, np.ndarray], sizes: Mapping[str, int]) -> dict[str, Memory]:
        """Upload the inputs and execute once; returns the outputs, which may still be in the making."""
        buffers = self.bind(feed, sizes)
        for name in set(self.engine.inputs) - self.engine.on_host:
            self._stream.upload(buffers[name], np.ascontiguousarray(feed[name]))
        self.enqueue()
        return {name: buffers[name] for name in self.engine.outputs}

    def enqueue(self) -> None:
        """Execute what is bound, after whatever the stream has to do before."""
        enter_context()
        if not self._context.execute_async_v3(int(self._stream.handle)):
            raise self.engine.failure("failed to run")

    def can_be_captured(self) -> bool:
        """Whether a CUDA graph can hold a run of the engine; TensorRT-RTX tells, TensorRT shows."""
        enter_context()
        ask = getattr(self._context, "is_stream_capturable", None)
        return ask is None or ask(int(self._stream.handle))


class PinnedInputs:
    """Inputs that change from run to run, side by side in one buffer, so that one copy brings all of them.

    Args:
        layout: shape and dtype of each.

    Raises:
        CapaError: there is no room.
    """

    def __init__(self, layout: Mapping[str, tuple[tuple[int, ...], Any]]) -> None:
        sizes = {name: prod(shape) * np.dtype(dtype).itemsize for name, (shape, dtype) in layout.items()}
        starts, total = _side_by_side(sizes)
        self._device, self._pinned = Buffer(total), PinnedBuffer(total)
        self.regions = {name: self._device.part(starts[name], sizes[name]) for name in layout}
        self._views = {name: self._pinned.view(starts[name], *layout[name]) for name in layout}

    def fill(self, feed: Mapping[str, np.ndarray]) -> None:
        """Take over the values; the last ones must have been copied."""
        for name, view in self._views.items():
            view[...] = feed[name]

    def copy_in(self, stream: Stream) -> None:
        """Bring the values to the device, without waiting."""
        stream.copy_in(self._device, self._pinned)


class Arena:
    """Memory that tensors of one shape or another have in turn, as large as the largest of them needed so far."""

    def __init__(self) -> None:
        self._buffer: Buffer | None = None

    @property
    def num_bytes(self) -> int:
        return self._buffer.num_bytes if self._buffer else 0

    @staticmethod
    def bytes_of(sizes: Mapping[str, int]) -> int:
        """What tensors of so many bytes need here."""
        return _side_by_side(sizes)[1]

    def regions(self, sizes: Mapping[str, int]) -> dict[str, Memory]:
        """A place for each of these tensors; where the arena has to grow, what had its place here keeps the old memory.

        Raises:
            CapaError: the GPU has no room.
        """
        starts, total = _side_by_side(sizes)
        if self._buffer is None or total > self._buffer.num_bytes:
            # The old memory first.
            self._buffer = None
            self._buffer = Buffer(total)
        return {name: self._buffer.part(starts[name], size) for name, size in sizes.items()}


def _side_by_side(sizes: Mapping[str, int]) -> tuple[dict[str, int], int]:
    """Where in one buffer each of some tensors begins, and the buffer's bytes."""
    starts: dict[str, int] = {}
    end = 0
    for name, size in sizes.items():
        starts[name] = end
        end += -(-size // ALIGNMENT) * ALIGNMENT
    return starts, end


def _aligned(array: np.ndarray) -> np.ndarray:
    """A copy at an address that TensorRT takes."""
    room = np.empty(array.nbytes + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    copy = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy
