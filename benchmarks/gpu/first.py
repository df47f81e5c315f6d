"""What is most telling on a GPU that nothing has run on: kernels and plugins by value, through the driver alone."""

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from cases import Case, skip
from enqueue import NativePlugins
from problem import HALVES, SIZES, Problem, problems

from capa_export.base.errors import CapaError
from capa_export.kernels import OPERATORS
from capa_export.kernels.cuda import Buffer, PinnedBuffer, Rows, Stream, require_gpu

__all__ = ["SMALL", "STEPS", "cases"]

_SIZES: Mapping[str, Mapping[str, int]] = {
    "Qwen2.5-VL-7B": SIZES["Qwen2.5-VL-7B"],
    "odd sizes": {"hidden_size": 208, "heads": 6, "kv_heads": 1, "tokens": 333, "kept": 107, "head_size": 80},
}
SMALL: Mapping[str, Mapping[str, int]] = {
    "small": {"hidden_size": 144, "heads": 4, "kv_heads": 2, "tokens": 120, "kept": 70, "head_size": 64}
}
STEPS = {"Qwen2.5-VL-7B": (28, 4, 4096), "LLaVA-1.5-7B": (32, 32, 4096)}
"""Layers, heads and rows of the caches that a step of decode moves on by one row."""
_ROW_BYTES = 256
_VOCABULARY = 152_064
Timed: TypeAlias = Callable[[Callable[[], object]], float]
"""Takes the milliseconds of work."""


def cases(
    work: Path,
    sizes: Mapping[str, Mapping[str, int]] = _SIZES,
    steps: Mapping[str, tuple[int, int, int]] = STEPS,
    kinds: Sequence[str] = ("cubin", "ptx"),
    rounds: int = 30,
) -> Iterator[Case]:
    """Checks, the most telling first.

    Args:
        work: scratch folder.
        sizes: of the problems.
        steps: layers, heads and rows of caches.
        kinds: of kernel images.
        rounds: runs that a time is the mean of; 0 takes no times.
    """
    try:
        gpu = require_gpu()
    except CapaError as error:
        yield "first", partial(skip, str(error))
        return
    yield "this GPU", lambda: {"name": gpu.name, "compute capability": gpu.compute_capability, "CUDA": gpu.cuda}
    from capa_export.kernels.compile import COMPUTE_CAPABILITIES, compile_kernels
    from capa_export.kernels.plugins.launcher import Launcher

    stream, capability = Stream(), gpu.compute_capability
    timed = partial(_milliseconds, stream, rounds)
    heads = sorted({one.get("head_size", 128) for one in sizes.values()})
    on_device = {one.name: _OnDevice(one, stream) for one in problems("cpu", sizes)}
    # A GPU that is not known has the PTX of the lowest.
    known = [kind for kind in kinds if kind == "ptx" or capability in COMPUTE_CAPABILITIES]
    for kind in known:
        lowest = COMPUTE_CAPABILITIES[0] if kind == "ptx" else capability
        compiled = compile_kernels(OPERATORS, [lowest], head_sizes=heads, ptx=kind == "ptx")
        launcher = Launcher([one for one in compiled if one.kind == kind])
        for name, one in on_device.items():
            yield f"{name}: {kind}", partial(_kernels, one, launcher, timed)
        if kind == known[0]:
            yield from _native(work, capability, on_device)
            for name, one in on_device.items():
                yield f"{name}: in a CUDA graph", partial(_graph, one, launcher, stream, timed)
            for name, (layers, num_heads, rows) in steps.items():
                what = f"host and caches of a step, {name}, {rows} rows"
                yield what, partial(_step, stream, layers, num_heads, rows, gpu.memory_bytes, timed)
    yield "another thread", _thread


class _OnDevice:
    """A problem whose tensors lie in memory of the driver."""

    def __init__(self, problem: Problem, stream: Stream) -> None:
        self.problem, self._stream = problem, stream
        operator, size = problem.operator, problem.size
        types = {"real": HALVES[problem.half], "fp32": torch.float32, "int64": torch.int64}
        self.inputs = {name: one for name, one in problem.inputs.items() if name not in operator.value_inputs}
        self.outputs = {
            name: (types[one.dtype], [n if isinstance(n, int) else getattr(size, n) for n in one.shape])
            for name, one in operator.outputs.items()
        }
        self._buffers: dict[str, Buffer] = {}

    @property
    def buffers(self) -> dict[str, Buffer]:
        """Inputs, uploaded at the first use, and outputs."""
        if not self._buffers:
            for name, tensor in self.inputs.items():
                data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
                self._buffers[name] = Buffer(data.nbytes)
                self._stream.upload(self._buffers[name], data)
            for name, (dtype, shape) in self.outputs.items():
                self._buffers[name] = Buffer(int(np.prod(shape)) * dtype.itemsize)
        return self._buffers

    @property
    def stream_handle(self) -> int:
        return int(self._stream.handle)

    def poison(self, *more: Buffer) -> None:
        """Fill outputs with what is no number: what is forgotten shows."""
        for buffer in (*(self.buffers[name] for name in self.outputs), *more):
            self._stream.upload(buffer, np.full(buffer.num_bytes, 255, np.uint8))

    def check(self) -> None:
        """Hold the outputs against the reference."""
        found: list[torch.Tensor] = []
        for name, (dtype, shape) in self.outputs.items():
            raw = self._stream.download(self.buffers[name], (self.buffers[name].num_bytes,), np.uint8)
            found.append(torch.from_numpy(raw).view(dtype).reshape(shape))
        self.problem.check(tuple(found))

    def launch(self, launcher: Any) -> tuple[Callable[[], None], Buffer]:
        """What launches the kernels, and their scratch memory."""
        from capa_export.kernels.plugins.launcher import scratch_offsets

        problem = self.problem
        offsets, num_bytes = scratch_offsets(problem.operator, problem.size)
        scratch = Buffer(num_bytes)
        calls = launcher.prepare(problem.operator, problem.half, problem.size)
        addresses = {name: buffer.address for name, buffer in self.buffers.items()}
        addresses |= {name: scratch.address + offset for name, offset in offsets.items()}
        given = {**addresses, **problem.attributes}
        return lambda: launcher.launch(problem.operator, calls, given, int(self._stream.handle)), scratch


def _kernels(one: _OnDevice, launcher: Any, timed: Timed) -> dict[str, Any]:
    launch, scratch = one.launch(launcher)
    one.poison(scratch)
    launch()
    one.check()
    return {"ms": timed(launch)}


def _graph(one: _OnDevice, launcher: Any, stream: Stream, timed: Timed) -> dict[str, Any]:
    launch, scratch = one.launch(launcher)
    launch()
    graph = stream.capture(launch)
    one.poison(scratch)
    graph.launch(stream)
    one.check()
    return {"ms": timed(lambda: graph.launch(stream))}


def _native(work: Path, capability: str, on_device: Mapping[str, _OnDevice]) -> Iterator[Case]:
    """The C++ plugin's own `enqueue`; one row where it cannot be compiled."""
    include = os.environ.get("TENSORRT_INCLUDE")
    if not include or shutil.which("g++") is None:
        yield "C++ plugin", partial(skip, "needs TENSORRT_INCLUDE, the folder of TensorRT's headers, and g++")
        return
    plugins: list[NativePlugins] = []

    def build() -> dict[str, Any]:
        from capa_export.kernels.plugins.native import build_library

        try:
            library = build_library(work, compute_capabilities=[capability], tensorrt_include=Path(include)).path
        except CapaError as error:
            skip(str(error))
        plugins.append(NativePlugins(library, NativePlugins.build_caller(work, Path(include))))
        return {"MB": library.stat().st_size / 1e6}

    yield "C++ plugin: build", build
    if plugins:
        for name, one in on_device.items():
            yield f"{name}: C++ plugin", partial(_enqueue, one, plugins[0])


def _enqueue(one: _OnDevice, plugins: NativePlugins) -> dict[str, Any]:
    described = [(tensor.dtype, tuple(tensor.shape), one.buffers[name].address) for name, tensor in one.inputs.items()]
    described += [(dtype, tuple(shape), one.buffers[name].address) for name, (dtype, shape) in one.outputs.items()]
    held: list[Buffer] = []

    def allocate(num_bytes: int) -> int:
        held.append(Buffer(num_bytes))
        return held[-1].address

    one.poison()
    plugins.run(one.problem.operator, described, one.problem.attributes, allocate, one.stream_handle)
    one.check()
    return {"workspace_MB": sum(buffer.num_bytes for buffer in held) / 1e6}


def _step(stream: Stream, layers: int, heads: int, rows: int, memory_bytes: int, timed: Timed) -> dict[str, Any]:
    """A step of decode without its engine: what goes in, caches moved on by a row, logits out, and the likeliest.

    The caches are as the runtime has them: what decode writes has one row more, and without its first row is the next
    step's.
    """
    past_bytes, grown_bytes = heads * rows * _ROW_BYTES, heads * (rows + 1) * _ROW_BYTES
    if 2 * layers * (past_bytes + grown_bytes) > 0.8 * memory_bytes:
        skip("the GPU has no room for such caches")
    caches = [(Buffer(past_bytes), Buffer(grown_bytes)) for _ in range(2 * layers)]
    inputs, logits = PinnedBuffer(8192), PinnedBuffer(4 * _VOCABULARY)
    inputs_there, logits_there = Buffer(8192), Buffer(4 * _VOCABULARY)
    view = logits.view(0, (_VOCABULARY,), np.float32)

    def work() -> None:
        stream.copy_in(inputs_there, inputs)
        for past, grown in caches:
            source = Rows(grown.address + _ROW_BYTES, (rows + 1) * _ROW_BYTES)
            stream.copy_rows(Rows(past.address, rows * _ROW_BYTES), source, rows * _ROW_BYTES, heads)
        stream.copy_out(logits, logits_there)

    stream.upload(logits_there, np.eye(1, _VOCABULARY, 7, np.float32))
    grown = np.random.default_rng(0).integers(0, 256, (heads, rows + 1, _ROW_BYTES), np.uint8)
    stream.upload(caches[-1][1], grown)
    graph = stream.capture(work)

    def step() -> None:
        inputs.view(0, (8192,), np.uint8)[...] = 1
        graph.launch(stream)
        stream.synchronize()
        view.argmax()

    step()
    assert view.argmax() == 7, "the logits are others"
    moved = stream.download(caches[-1][0], (heads, rows, _ROW_BYTES), np.uint8)
    assert np.array_equal(moved, grown[:, 1:]), "the cache is not moved on by a row"
    ms = timed(step)
    return {"ms": ms, "GBps": 2 * 2 * layers * past_bytes / ms / 1e6}


def _thread() -> dict[str, Any]:
    """Memory for a thread that has not made the context current."""
    failures: list[Exception] = []

    def work() -> None:
        try:
            Buffer(16)
        except Exception as error:  # noqa: BLE001 - raised where it is seen.
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return {}


def _milliseconds(stream: Stream, rounds: int, work: Callable[[], object]) -> float:
    """Mean on the clock of work that follows upon itself; 0 of no rounds."""
    if not rounds:
        return 0.0
    work()
    stream.synchronize()
    started = time.perf_counter()
    for _ in range(rounds):
        work()
    stream.synchronize()
    return 1e3 * (time.perf_counter() - started) / rounds
