"""Generates with a bundle's engines: weights, KV cache and decode steps stay on the GPU.

B = batch, S = stages, G = KV heads, P = rows of a cache, d = head size, V = vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from capa_export.base.errors import CapaError
from capa_export.base.progress import say
from capa_export.graph.contract import (
    DEEPSTACK_EMBEDS,
    INPUTS_EMBEDS,
    LOGITS,
    NUM_KEEP,
    PAST_LENGTHS,
    PIXEL_VALUES,
    POSITION_IDS,
    cache_length,
    is_cache,
    is_present,
    present_name,
)
from capa_export.kernels.cuda import Buffer, Graph, Rows, Stream
from capa_export.model.prompt import Picture, Prompt
from capa_export.plan.device_memory import CACHE_ROWS
from capa_export.run.engine import BuiltEngines, DeviceWeights, LoadedEngine, TensorRTRuntime
from capa_export.run.runtime import RuntimeModel

__all__ = ["DeviceCache", "EngineModel"]


@dataclass(eq=False)
class DeviceCache:
    """Keys and values on the device; the rows that count are the last ones, those before them are zero."""

    tensors: dict[str, Buffer]
    """Decode's past inputs by name, [B, G, P, d] each."""
    lengths: np.ndarray
    """[1 + S, B] int64: rows that are a prompt's own, before the first stage and behind each."""
    rows: tuple[int, ...]
    """P before the first stage and behind each; more than the lengths, where there is room for an answer."""

    @property
    def sizes(self) -> dict[str, int]:
        """Decode's symbolic dimensions."""
        past = {cache_length("past", stage): rows for stage, rows in enumerate(self.rows)}
        total = {cache_length("total", stage): rows + 1 for stage, rows in enumerate(self.rows)}
        return {"batch": self.lengths.shape[1], "step": 1, **past, **total}


class EngineModel(RuntimeModel[DeviceCache]):
    """A bundle's three engines on the first GPU."""

    def __init__(self, built: BuiltEngines) -> None:
        """Load the engines and upload their weights.

        Raises:
            CapaError: an engine does not load, or the GPU has no room.
        """
        self.folder, self.gpu = built.onnx, built.gpu
        self._stream = Stream()
        self._weights = DeviceWeights(self._stream)
        runtime = TensorRTRuntime(built)
        self._visual = LoadedEngine(runtime, "visual/visual", self._weights)
        self._prefill = LoadedEngine(runtime, "llm/prefill", self._weights)
        self._decode = LoadedEngine(runtime, "llm/decode", self._weights, one_shape=True)
        self._decoding: _Decoding | None = None
        self.captures = True
        """Whether decode makes a CUDA graph of a step; False from the first that it cannot make."""

    @property
    def memory(self) -> dict[str, int]:
        """Bytes on the device; embedded weights are in the plans, and those that engines share in `weights`."""
        engines = (self._visual, self._prefill, self._decode)
        return {
            "weights": self._weights.num_bytes,
            "plans": sum(engine.plan_bytes for engine in engines),
            "contexts": sum(engine.context_bytes for engine in engines),
            "kv_cache": self._decoding.num_bytes if self._decoding else 0,
        }

    @property
    def device(self) -> dict[str, Any]:
        return {"gpu": self.gpu.name, "gpu_bytes": self.memory}

    @cached_property
    def dtype(self) -> Any:
        return self._decode.dtypes[INPUTS_EMBEDS]

    @cached_property
    def _axes(self) -> int:
        axes = self._decode.axis(POSITION_IDS, 0)
        assert isinstance(axes, int)
        return axes

    def _deepstack_layers(self, prompt: Prompt) -> int:  # noqa: ARG002 - one engine serves every prompt.
        return int(self._prefill.axis(DEEPSTACK_EMBEDS, 0)) if DEEPSTACK_EMBEDS in self._prefill.inputs else 0

    def check(self, prompts: Sequence[Prompt], num_keep: Sequence[Sequence[int]], new_tokens: int) -> None:
        """Refuse prompts that the engines were not built for, or whose answers would not fit behind them.

        Raises:
            CapaError: one does not fit.
        """
        for prompt, kept in zip(prompts, num_keep, strict=True):
            for picture in prompt.pictures:
                self._visual.check(self._visual.sizes({PIXEL_VALUES: picture.patches}))
            self._prefill.check({"sequence": len(prompt.input_ids), "text": len(prompt.text_positions)}, kept)
        self._decode.check(_with_room(_lengths(prompts, num_keep), new_tokens).sizes)

    def room(self, prompts: Sequence[Prompt], num_keep: Sequence[Sequence[int]]) -> int:
        """The longest answer that the engines have room for behind such prompts; one token where there is none."""
        limits, sizes = self._decode.limits, _with_room(_lengths(prompts, num_keep), 1).sizes
        return 1 + max(0, min(limits[name][1] - sizes[name] for name in sizes.keys() & limits if "past" in name))

    def load(self, prompt: Prompt) -> None:  # noqa: ARG002 - as above.
        _ = self._embedding

    def features(self, picture: Picture) -> dict[str, np.ndarray]:
        feed, sizes = {PIXEL_VALUES: picture.patches.astype(self.dtype)}, {"tokens": picture.num_tokens}
        outputs = self._visual.run(feed, sizes, self._stream)
        return {name: self._download(self._visual, name, buffer, sizes) for name, buffer in outputs.items()}

    def _download(self, engine: LoadedEngine, name: str, buffer: Buffer, sizes: Mapping[str, int]) -> np.ndarray:
        return self._stream.download(buffer, engine.shape(name, sizes), engine.dtypes[name])

    def _fill(self, prompt: Prompt, feed: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Prefill's outputs; the keys and values stay on the device."""
        rows = prompt.num_rows(feed[NUM_KEEP].tolist())
        sizes = {cache_length("sequence", stage): count for stage, count in enumerate(rows, start=1)}
        outputs = self._prefill.run(feed, sizes, self._stream)
        return {
            name: buffer if is_present(name) else self._download(self._prefill, name, buffer, sizes)
            for name, buffer in outputs.items()
        }

    def _cache(self, past: dict[str, Any], lengths: np.ndarray) -> DeviceCache:
        return DeviceCache(past, lengths, tuple(lengths[:, 0].tolist()))

    def batch(self, caches: Sequence[DeviceCache], new_tokens: int) -> DeviceCache:
        cache = _with_room(np.concatenate([cache.lengths for cache in caches], axis=1), new_tokens)
        self._decode.check(cache.sizes)
        cache.rows = tuple(self._rounded(rows, stage) for stage, rows in enumerate(cache.rows))
        for name in caches[0].tensors:
            cache.tensors[name] = self._stacked(name, caches, cache.sizes)
        return cache

    def _rounded(self, rows: int, stage: int) -> int:
        # Where the first layer prunes, no cache has the length before the first stage.
        _, most = self._decode.limits.get(cache_length("past", stage), (0, rows))
        return min(-(-rows // CACHE_ROWS) * CACHE_ROWS, most)

    def _stacked(self, name: str, caches: Sequence[DeviceCache], sizes: Mapping[str, int]) -> Buffer:
        """One past input of a batch, each prompt's rows at the end."""
        engine, stream = self._decode, self._stream
        batch, heads, rows, head_size = engine.shape(name, sizes)
        row = engine.num_bytes(name, (head_size,))
        stacked = Buffer(batch * heads * rows * row)
        # Masked, but 0 x NaN would be NaN.
        stream.zero(stacked)
        for index, cache in enumerate(caches):
            own = engine.shape(name, cache.sizes)[2]
            start = stacked.address + (index * heads * rows + rows - own) * row
            source = Rows(cache.tensors[name].address, own * row)
            stream.copy_rows(Rows(start, rows * row), source, own * row, heads)
        return stacked

    def append(
        self, cache: DeviceCache, tokens: Sequence[Sequence[int]], positions: Sequence[int]
    ) -> tuple[np.ndarray, DeviceCache]:
        """Logits [B, V] after one more token [B, 1] of each row, and the cache, which grew in place."""
        assert (cache.lengths.max(axis=1) <= cache.rows).all(), "batch() was asked for fewer tokens"
        feed = {**self._token_feed(tokens, positions), PAST_LENGTHS: cache.lengths}
        if self._decoding is None or self._decoding.cache is not cache:
            # The memory of the last one first.
            self._decoding = None
            self._decoding = _Decoding(self._decode, self._stream, cache, feed)
        decoding = self._decoding
        if self.captures and decoding.warm and decoding.graph is None:
            try:
                decoding.capture()
            except CapaError as error:
                self.captures = False
                say(f"decode runs without a CUDA graph, which is slower: {error}")
        logits = decoding.step(feed)
        cache.lengths = cache.lengths + 1
        return logits, cache


def _lengths(prompts: Sequence[Prompt], num_keep: Sequence[Sequence[int]]) -> np.ndarray:
    """[1 + S, B]: rows of each prompt before the first stage and behind each."""
    rows = [[len(prompt.input_ids), *prompt.num_rows(kept)] for prompt, kept in zip(prompts, num_keep, strict=True)]
    return np.array(rows).T


def _with_room(lengths: np.ndarray, new_tokens: int) -> DeviceCache:
    """A cache, still without memory, of prompts [1 + S, B] and answers of up to `new_tokens`."""
    rows = lengths.max(axis=1) + new_tokens - 1
    return DeviceCache({}, lengths, tuple(rows.tolist()))


class _Decoding:
    """Steps behind one cache: the same shapes and addresses each time, so that one CUDA graph holds any of them."""

    def __init__(
        self, engine: LoadedEngine, stream: Stream, cache: DeviceCache, feed: Mapping[str, np.ndarray]
    ) -> None:
        self.cache = cache
        self.graph: Graph | None = None
        self.warm = False
        """Whether a step has run: TensorRT prepares for new shapes in the first, which cannot be captured."""
        self._engine, self._stream, self._sizes = engine, stream, cache.sizes
        self._buffers = engine.bind(feed, self._sizes, cache.tensors)

    @property
    def num_bytes(self) -> int:
        """Bytes of the cache, and of its copy with one more row that a step writes."""
        return sum(buffer.num_bytes for name, buffer in self._buffers.items() if is_cache(name))

    def capture(self) -> None:
        """Make the graph of a step.

        Raises:
            CapaError: it cannot be captured.
        """
        self._engine.require_capturable(self._stream)
        self.graph = self._stream.capture(self._enqueue)

    def step(self, feed: Mapping[str, np.ndarray]) -> np.ndarray:
        """Logits [B, V] of one more token of each row, whose keys and values are then the cache's last rows."""
        for name, array in feed.items():
            self._stream.upload(self._buffers[name], np.ascontiguousarray(array))
        if self.graph is not None:
            self.graph.launch(self._stream)
        else:
            self._enqueue()
        self.warm = True
        shape = self._engine.shape(LOGITS, self._sizes)
        return self._stream.download(self._buffers[LOGITS], shape, self._engine.dtypes[LOGITS])

    def _enqueue(self) -> None:
        self._engine.enqueue(self._stream)
        for name, past in self.cache.tensors.items():
            # What a step writes is the cache with one row behind it; without its first row it is the next step's.
            present = self._buffers[present_name(name)]
            batch, heads, rows, head_size = self._engine.shape(name, self._sizes)
            row = self._engine.num_bytes(name, (head_size,))
            grown = Rows(present.address + row, (rows + 1) * row)
            self._stream.copy_rows(Rows(past.address, rows * row), grown, rows * row, batch * heads)
