"""Decode steps of an engine: what they read and write, in which memory, and the CUDA graph of one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from math import lcm
from typing import Any

import numpy as np

from capa_export.base.errors import CapaError
from capa_export.graph.contract import (
    LOGITS,
    cache_stages,
    counted_in_blocks,
    is_past,
    is_present,
    past_name,
    present_name,
)
from capa_export.kernels.cuda import Buffer, Graph, Memory, PinnedBuffer, Planes, Stream
from capa_export.run.engine import LoadedEngine
from capa_export.run.execution import ALIGNMENT, Arena, Execution, PinnedInputs

__all__ = ["StepWork", "Steps", "row_bytes", "stage_of"]


def stage_of(engine: LoadedEngine, name: str) -> int:
    """How many stages have pruned this cache."""
    return cache_stages(counted_in_blocks(str(engine.axis(past_name(name) if is_present(name) else name, 2))) or "")


def row_bytes(engine: LoadedEngine, name: str) -> int:
    """Bytes of one head's row of a cache."""
    return engine.num_bytes(name, (int(engine.axis(name, -1)),))


class StepWork:
    """Work that is the same at every step, in the same memory each time, so that one CUDA graph holds any of them."""

    def __init__(self) -> None:
        self.graph: Graph | None = None
        self.warm = False
        """Whether it has run: TensorRT prepares for new shapes in the first step, which cannot be captured."""


class Steps:
    """Steps behind caches of one shape.

    Args:
        engine: decode.
        stream: that they run on.
        activations: memory between inputs and outputs.
        arena: memory of the cache.
        sizes: of decode's symbolic dimensions.

    Raises:
        CapaError: TensorRT refuses, or the GPU has no room.
    """

    def __init__(
        self, engine: LoadedEngine, stream: Stream, activations: Buffer, arena: Arena, sizes: Mapping[str, int]
    ) -> None:
        self.stream = stream
        self.shapes = shapes = {name: engine.shape(name, sizes) for name in (*engine.inputs, *engine.outputs)}
        self.past = arena.regions(_cache_sizes(engine, sizes))
        fresh = _fresh_rows(engine, sizes)
        self._growths = _growths(engine, sizes, self.past, fresh)
        self._inputs = PinnedInputs(
            {name: (shapes[name], engine.dtypes[name]) for name in engine.inputs if name not in self.past}
        )
        # A context of its own: what it prepares for its shapes is part of the graph.
        self.execution: Execution = engine.execution(stream, activations)
        self.buffers = self.execution.bind({}, sizes, {**self.past, **fresh, **self._inputs.regions})
        self.given = StepWork()
        """A step of tokens from the host, and its logits there."""
        self._pinned = PinnedBuffer(engine.num_bytes(LOGITS, shapes[LOGITS]))
        self._logits = self._pinned.view(0, shapes[LOGITS], engine.dtypes[LOGITS])
        self._logits.flags.writeable = False
        self.choices: dict[bool, Any] = {}
        """What chooses tokens on the device for these steps, by whether it samples."""

    @staticmethod
    def cache_bytes(engine: LoadedEngine, sizes: Mapping[str, int]) -> int:
        """Bytes of a cache."""
        return Arena.bytes_of(_cache_sizes(engine, sizes))

    def capture(self, work: StepWork, enqueue: Callable[[], None]) -> None:
        """Make the graph of a step, of what `enqueue` puts on the stream.

        Raises:
            CapaError: it cannot be captured.
        """
        if not self.execution.can_be_captured():
            raise CapaError("the engine allocates memory of its own while it runs")
        work.graph = self.stream.capture(enqueue)

    def fill(self, feed: Mapping[str, np.ndarray]) -> None:
        """Take over the inputs of a step of tokens from the host."""
        self._inputs.fill(feed)

    def run(self, work: StepWork, enqueue: Callable[[], None], lengths: np.ndarray) -> None:
        """Run a step to its end; the keys and values of its tokens are then behind the `lengths` [1 + S, B] before."""
        if work.graph is not None:
            work.graph.launch(self.stream)
        else:
            enqueue()
        # Not in the graph: it goes to another row at every step.
        for growth in self._growths:
            for prompt, length in enumerate(lengths[growth.stage].tolist()):
                growth.append(self.stream, prompt, length)
        self.stream.synchronize()

    @property
    def logits(self) -> np.ndarray:
        """[B, V] of the last step of tokens from the host."""
        return self._logits

    def enqueue(self) -> None:
        """Put a step of tokens from the host on the stream, and its logits' way back."""
        self._inputs.copy_in(self.stream)
        self.execution.enqueue()
        self.stream.copy_out(self._pinned, self.buffers[LOGITS])


@dataclass(frozen=True, kw_only=True, slots=True)
class _Growth:
    """Where the caches of equally long layers get their new rows; each lies behind the other at equal distances."""

    stage: int
    num_caches: int
    heads: int
    row: int
    """Bytes of a head's row."""
    past: Planes
    """Of the first prompt."""
    fresh: Planes
    """Of the first prompt."""

    def append(self, stream: Stream, prompt: int, length: int) -> None:
        """Copy a prompt's new row of every head and layer behind its `length` others."""
        past, fresh = self.past, self.fresh
        first = past.address + prompt * self.heads * past.pitch + length * self.row
        stream.copy_planes(
            replace(past, address=first),
            replace(fresh, address=fresh.address + prompt * self.heads * self.row),
            self.row,
            self.heads,
            self.num_caches,
        )


def _growths(
    engine: LoadedEngine, sizes: Mapping[str, int], past: Mapping[str, Memory], fresh: Mapping[str, Memory]
) -> list[_Growth]:
    growths: list[_Growth] = []
    for stage, group in groupby(past, lambda name: stage_of(engine, name)):
        names = list(group)
        batch, heads, blocks, in_block, _ = engine.shape(names[0], sizes)
        row, new = row_bytes(engine, names[0]), [fresh[present_name(name)].address for name in names]
        apart = _fresh_bytes(engine, sizes, present_name(names[0]))
        height = batch * heads
        pitch = blocks * in_block * row
        assert [past[name].address for name in names] == [
            past[names[0]].address + index * height * pitch for index in range(len(names))
        ]
        assert new == [new[0] + index * apart for index in range(len(names))]
        growths.append(
            _Growth(
                stage=stage,
                num_caches=len(names),
                heads=heads,
                row=row,
                past=Planes(past[names[0]].address, pitch, height),
                fresh=Planes(new[0], row, apart // row),
            )
        )
    return growths


def _cache_sizes(engine: LoadedEngine, sizes: Mapping[str, int]) -> dict[str, int]:
    """Bytes of every past input, those of equally long caches side by side."""
    names = sorted((name for name in engine.inputs if is_past(name)), key=lambda name: stage_of(engine, name))
    return {name: engine.num_bytes(name, engine.shape(name, sizes)) for name in names}


def _fresh_bytes(engine: LoadedEngine, sizes: Mapping[str, int], name: str) -> int:
    """Bytes from the new rows of one cache to those of the next: whole rows, so that one copy takes all of them."""
    step = lcm(ALIGNMENT, row_bytes(engine, name))
    return -(-engine.num_bytes(name, engine.shape(name, sizes)) // step) * step


def _fresh_rows(engine: LoadedEngine, sizes: Mapping[str, int]) -> dict[str, Memory]:
    """Memory of what a step returns of keys and values, in the order of the caches."""
    names = [present_name(name) for name in _cache_sizes(engine, sizes)]
    room = {name: _fresh_bytes(engine, sizes, name) for name in names}
    memory, ends = Buffer(sum(room.values())), accumulate(room.values(), initial=0)
    return {name: memory.part(start, size) for (name, size), start in zip(room.items(), ends, strict=False)}
