"""Generates with a bundle's engines: weights, KV cache, decode steps and the choice of tokens stay on the GPU.

B = batch, S = stages, G = KV heads, P = rows of a cache, d = head size, V = vocabulary.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any
from weakref import ref

import numpy as np

from capa_export.base.errors import CapaError
from capa_export.base.progress import say
from capa_export.graph.contract import (
    CACHE_ROWS,
    DEEPSTACK_EMBEDS,
    INPUTS_EMBEDS,
    NUM_KEEP,
    PAST_LENGTHS,
    PIXEL_VALUES,
    POSITION_IDS,
    cache_length,
    is_present,
)
from capa_export.kernels.cuda import Buffer, Memory, Rows, Stream
from capa_export.model.prompt import Picture, Prompt
from capa_export.run.decoding import TokenRule
from capa_export.run.engine import BuiltEngines, DeviceWeights, LoadedEngine, TensorRTRuntime
from capa_export.run.execution import Arena
from capa_export.run.runtime import RuntimeModel
from capa_export.run.steps import Steps, StepWork, row_bytes, stage_of
from capa_export.selectors.selector import TOWER_OUTPUTS

if TYPE_CHECKING:
    from capa_export.run.token_steps import StepKernels, TokenChoice

__all__ = ["DeviceCache", "EngineModel"]

_MOST_STEPS = 16
"""CUDA graphs that are kept: a few megabytes each, and the caches of a conversation have few lengths."""


@dataclass(eq=False)
class DeviceCache:
    """Keys and values on the device; the rows that count are the first ones, those behind them are finite."""

    tensors: Mapping[str, Memory]
    """Decode's past inputs by name, [B, G, P, d] each, in blocks of P if there is room for an answer."""
    lengths: np.ndarray
    """[1 + S, B] int64: rows that are a prompt's own, before the first stage and behind each."""
    rows: tuple[int, ...]
    """P before the first stage and behind each; more than the lengths, where there is room for an answer."""
    steps: Steps | None = None
    """What appends tokens, where there is room for them."""

    @property
    def sizes(self) -> dict[str, int]:
        """Decode's symbolic dimensions."""
        past = {cache_length("past", stage): rows for stage, rows in enumerate(self.rows)}
        return {"batch": self.lengths.shape[1], "step": 1, **past}


class EngineModel(RuntimeModel[DeviceCache]):
    """A bundle's engines on the first GPU."""

    def __init__(self, built: BuiltEngines) -> None:
        """Load the engines and upload their weights.

        Raises:
            CapaError: an engine does not load, or the GPU has no room.
        """
        self.folder, self.gpu = built.onnx, built.gpu
        self._stream = Stream()
        self._weights = DeviceWeights(self._stream)
        runtime = TensorRTRuntime(built)
        self._visual = LoadedEngine(runtime, "visual/model.onnx", self._weights)
        self._prefill = LoadedEngine(runtime, "llm/prefill.onnx", self._weights)
        self._decode = LoadedEngine(runtime, "llm/decode.onnx", self._weights, one_shape=True)
        self._engines = (self._visual, self._prefill, self._decode)
        # One after the other on one stream, they are never at work together.
        self._activations = Buffer(max(engine.activation_bytes for engine in self._engines))
        self._seeing, self._filling = (
            engine.execution(self._stream, self._activations) for engine in (self._visual, self._prefill)
        )
        self._arena = Arena()
        self._steps: dict[tuple[int, ...], Steps] = {}
        """By batch and rows of the caches; their memory is the arena's, which one cache has at a time."""
        self._owner: ref[DeviceCache] | None = None
        """The cache that has the arena."""
        self.captures = True
        """Whether decode makes a CUDA graph of a step; False from the first that it cannot make."""
        self.chooses = True
        """Whether tokens are chosen on the device; False from the first time that it cannot be done."""
        self._kernels: StepKernels | None = None
        """Of the first answer, since they alone need Triton."""

    @property
    def memory(self) -> dict[str, int]:
        """Bytes on the device; embedded weights are in the plans, and those that engines share in `weights`."""
        return {
            "weights": self._weights.num_bytes,
            "plans": sum({engine.path: engine.plan_bytes for engine in self._engines}.values()),
            "contexts": self._activations.num_bytes,
            "kv_cache": self._arena.num_bytes,
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
        self._load_kernels()

    def features(self, picture: Picture) -> dict[str, np.ndarray]:
        feed, sizes = {PIXEL_VALUES: picture.patches.astype(self.dtype)}, {"tokens": picture.num_tokens}
        outputs = self._seeing.run(feed, sizes)
        return {name: self._download(self._visual, name, buffer, sizes) for name, buffer in outputs.items()}

    def _download(self, engine: LoadedEngine, name: str, buffer: Memory, sizes: Mapping[str, int]) -> np.ndarray:
        return self._stream.download(buffer, engine.shape(name, sizes), engine.dtypes[name])

    def _fill(self, prompt: Prompt, feed: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Prefill's outputs; the keys and values stay on the device."""
        rows = prompt.num_rows(feed[NUM_KEEP].tolist())
        sizes = {cache_length("sequence", stage): count for stage, count in enumerate(rows, start=1)}
        # Where no picture is shown, the tower has said nothing.
        blank = {
            name: np.zeros(self._prefill.shape(name, {"sequence": len(prompt.input_ids)}), self._prefill.dtypes[name])
            for name in self._prefill.inputs
            if name in TOWER_OUTPUTS and name not in feed
        }
        outputs = self._filling.run({**feed, **blank}, sizes)
        return {
            name: buffer if is_present(name) else self._download(self._prefill, name, buffer, sizes)
            for name, buffer in outputs.items()
        }

    def _cache(self, past: dict[str, Any], lengths: np.ndarray) -> DeviceCache:
        return DeviceCache(past, lengths, tuple(lengths[:, 0].tolist()))

    def batch(self, caches: Sequence[DeviceCache], new_tokens: int) -> DeviceCache:
        cache = _with_room(np.concatenate([cache.lengths for cache in caches], axis=1), new_tokens)
        self._decode.check(cache.sizes)
        cache.rows = tuple(-(-rows // CACHE_ROWS) * CACHE_ROWS for rows in cache.rows)
        cache.steps = self._steps_of(cache)
        cache.tensors = cache.steps.past
        for name, stacked in cache.tensors.items():
            self._stack(name, stacked, caches, cache.rows)
        return cache

    def _steps_of(self, cache: DeviceCache) -> Steps:
        """What runs steps behind a cache of this shape, with the memory for it."""
        if self._owner is not None and self._owner() is not None:
            # The other cache is still in use: this one is served, and nothing of it kept.
            return Steps(self._decode, self._stream, self._activations, Arena(), cache.sizes)
        key = (cache.lengths.shape[1], *cache.rows)
        if self._arena.num_bytes < Steps.cache_bytes(self._decode, cache.sizes):
            self._steps.clear()
        if key not in self._steps:
            if len(self._steps) == _MOST_STEPS:
                # The oldest.
                del self._steps[next(iter(self._steps))]
            self._steps[key] = Steps(self._decode, self._stream, self._activations, self._arena, cache.sizes)
        self._owner = ref(cache)
        return self._steps[key]

    def _stack(self, name: str, stacked: Memory, caches: Sequence[DeviceCache], rows: Sequence[int]) -> None:
        """Fill one past input of a batch, each prompt's rows at the start."""
        engine, stream, stage = self._decode, self._stream, stage_of(self._decode, name)
        heads, row = int(engine.axis(name, 1)), row_bytes(engine, name)
        # Masked, but 0 x NaN would be NaN.
        stream.zero(stacked)
        for index, cache in enumerate(caches):
            own = cache.rows[stage] * row
            start = Rows(stacked.address + index * heads * rows[stage] * row, rows[stage] * row)
            stream.copy_rows(start, Rows(cache.tensors[name].address, own), own, heads)

    def append(
        self, cache: DeviceCache, tokens: Sequence[Sequence[int]], positions: Sequence[int]
    ) -> tuple[np.ndarray, DeviceCache]:
        """Logits [B, V] after one more token [B, 1] of each row, and the cache, which grew in place.

        The next step writes its logits over these.
        """
        steps = cache.steps
        assert steps is not None, "batch() makes room"
        steps.fill({**self._token_feed(tokens, positions), PAST_LENGTHS: cache.lengths})
        self._step(cache, steps, steps.given, steps.enqueue)
        return steps.logits, cache

    def _step(self, cache: DeviceCache, steps: Steps, work: StepWork, enqueue: Callable[[], None]) -> None:
        """One more token of each row, from the second time on as a CUDA graph."""
        assert (cache.lengths.max(axis=1) < cache.rows).all(), "batch() was asked for fewer tokens"
        if self.captures and work.warm and work.graph is None:
            try:
                steps.capture(work, enqueue)
            except CapaError as error:
                self.captures = False
                say(f"decode runs without a CUDA graph, which is slower: {error}")
        steps.run(work, enqueue, cache.lengths)
        if not work.warm:
            # All three have now compiled what these shapes need.
            for engine in self._engines:
                engine.save_kernels()
        work.warm = True
        cache.lengths = cache.lengths + 1

    def choose(
        self, cache: DeviceCache, logits: np.ndarray, rules: Sequence[TokenRule], positions: Sequence[int]
    ) -> Iterator[np.ndarray] | None:
        steps = cache.steps
        assert steps is not None, "batch() makes room"
        if len({(rule.numbers, rule.top_k, rule.key is None) for rule in rules}) > 1:
            return None
        choice = self._choice(steps, sampled=rules[0].key is not None)
        return choice and self._chosen(choice, steps, cache, logits, rules, positions)

    def _load_kernels(self) -> "StepKernels | None":
        """The kernels around a step, with the embedding where they read it; None where the host chooses tokens."""
        if self._kernels is None and self.chooses:
            with self._host_chooses_instead():
                from capa_export.kernels import require_triton

                require_triton()
                from capa_export.run.token_steps import StepKernels

                self._kernels = StepKernels(self._embedding, self.dtype)
        return self._kernels

    def _choice(self, steps: Steps, *, sampled: bool) -> "TokenChoice | None":
        """What chooses tokens of these steps; None where the host does."""
        kernels = self._load_kernels()
        if kernels is not None and sampled not in steps.choices and self.chooses:
            from capa_export.run.token_steps import TokenChoice

            with self._host_chooses_instead():
                steps.choices[sampled] = TokenChoice(kernels, steps, sampled=sampled)
        return steps.choices.get(sampled) if self.chooses else None

    @contextmanager
    def _host_chooses_instead(self) -> Generator[None]:
        """Where the kernels cannot be had, say so once."""
        try:
            yield
        except CapaError as error:
            self.chooses = False
            say(f"tokens are chosen on the host, which is slower: {error}")

    def _chosen(
        self,
        choice: "TokenChoice",
        steps: Steps,
        cache: DeviceCache,
        logits: np.ndarray,
        rules: Sequence[TokenRule],
        positions: Sequence[int],
    ) -> Iterator[np.ndarray]:
        choice.begin(logits, rules, positions, cache.lengths)
        while True:
            yield choice.tokens
            self._step(cache, steps, choice.work, choice.enqueue)


def _lengths(prompts: Sequence[Prompt], num_keep: Sequence[Sequence[int]]) -> np.ndarray:
    """[1 + S, B]: rows of each prompt before the first stage and behind each."""
    rows = [[len(prompt.input_ids), *prompt.num_rows(kept)] for prompt, kept in zip(prompts, num_keep, strict=True)]
    return np.array(rows).T


def _with_room(lengths: np.ndarray, new_tokens: int) -> DeviceCache:
    """A cache, still without memory, of prompts [1 + S, B] and answers of up to `new_tokens`."""
    rows = lengths.max(axis=1) + new_tokens - 1
    return DeviceCache({}, lengths, tuple(rows.tolist()))
