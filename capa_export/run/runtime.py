"""Runs a bundle's graphs: the part that all runtimes share.

B = batch, T = prompt tokens, D = hidden size, V = vocabulary, K = tokens kept, G = KV heads, d = head size.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from capa_export.export.in_place import embedding_of
from capa_export.graph.contract import (
    DEEPSTACK_EMBEDS,
    DEEPSTACK_FEATURES,
    IMAGE_FEATURES,
    INPUTS_EMBEDS,
    LOGITS,
    NUM_KEEP,
    POSITION_IDS,
    TEXT_POSITIONS,
    is_kept,
    kept_name,
    past_of,
)
from capa_export.model.prompt import Picture, Prompt
from capa_export.run.decoding import TokenRule
from capa_export.selectors.selector import TOWER_OUTPUTS

__all__ = ["KVCache", "PrefillRun", "RuntimeModel"]

Cache = TypeVar("Cache")


@dataclass(frozen=True)
class KVCache:
    """Keys and values of a batch of prompts; shorter rows are padded in front, so that new tokens go behind all."""

    tensors: dict[str, Any]
    """Decode's past inputs by name, [B, G, P, d] each: arrays, or what ONNX Runtime holds on a device."""
    lengths: np.ndarray
    """[1 + stages, B] int64: rows that are a prompt's own, before the first stage and behind each."""

    @classmethod
    def stacked(cls, caches: "Sequence[KVCache]") -> "KVCache":
        """Merge several caches into one batch."""
        names = caches[0].tensors
        tensors = {name: _stacked([cache.tensors[name] for cache in caches]) for name in names}
        return cls(tensors, np.concatenate([cache.lengths for cache in caches], axis=1))


def _stacked(rows: Sequence[np.ndarray]) -> np.ndarray:
    longest = max(row.shape[2] for row in rows)
    return np.concatenate([np.pad(row, ((0, 0), (0, 0), (longest - row.shape[2], 0), (0, 0))) for row in rows])


@dataclass(frozen=True)
class PrefillRun(Generic[Cache]):
    """The result of a prefill."""

    logits: np.ndarray
    """[V] FP32, last position."""
    cache: Cache
    kept: list[np.ndarray]
    """Prompt positions [K] that survive each stage, ascending."""


class RuntimeModel(ABC, Generic[Cache]):
    """A bundle's graphs as one runtime runs them, and its embedding table."""

    folder: Path
    """The bundle's `onnx` folder."""

    @property
    def device(self) -> dict[str, Any]:
        """Entries of a result about the device it runs on; none for this machine's processor."""
        return {}

    @cached_property
    @abstractmethod
    def dtype(self) -> Any:
        """Dtype of the activations."""

    @cached_property
    @abstractmethod
    def _axes(self) -> int:
        """Rows of the position ids."""

    @abstractmethod
    def _deepstack_layers(self, prompt: Prompt) -> int:
        """Decoder layers whose outputs gain vision features."""

    @abstractmethod
    def load(self, prompt: Prompt) -> None:
        """Open all that a prompt needs now, so that no time is spent on it later."""

    @abstractmethod
    def features(self, picture: Picture) -> dict[str, np.ndarray]:
        """The vision tower's outputs for one picture."""

    @abstractmethod
    def _fill(self, prompt: Prompt, feed: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Prefill's outputs."""

    @abstractmethod
    def _cache(self, past: dict[str, Any], lengths: np.ndarray) -> Cache:
        """A cache of decode's past inputs; `lengths` as `past_lengths`."""

    @abstractmethod
    def batch(self, caches: Sequence[Cache], new_tokens: int) -> Cache:
        """Merge several caches into one batch, for answers of up to `new_tokens`."""

    @abstractmethod
    def append(
        self, cache: Cache, tokens: Sequence[Sequence[int]], positions: Sequence[int]
    ) -> tuple[np.ndarray, Cache]:
        """Logits [B, V] after more text tokens [B, S], each row's first at its position, and the grown cache.

        The next call may write over the logits.
        """

    def choose(
        self,
        cache: Cache,  # noqa: ARG002 - a device's.
        logits: np.ndarray,  # noqa: ARG002
        rules: Sequence[TokenRule],  # noqa: ARG002
        positions: Sequence[int],  # noqa: ARG002
    ) -> Iterator[np.ndarray] | None:
        """Tokens [B] of all answers, step by step and without end, chosen on the device; None where the host has to.

        Args:
            cache: of the prompts, which grows.
            logits: [B, V], of the prompts.
            rules: of each answer.
            positions: of each answer's first token.
        """
        return None

    @cached_property
    def _embedding(self) -> np.ndarray:
        """[V, D], mapped from the file rather than read."""
        return embedding_of(self.folder / "llm").mapped()

    def embed(self, prompt: Prompt) -> dict[str, np.ndarray]:
        """Prefill's inputs that hold embeddings: the table's rows, and the vision tower's output at visual tokens.

        inputs_embeds [1, T, D]; deepstack_embeds [layers, T, D] where the decoder has DeepStack layers;
        visual_saliency [T] and visual_features [T, F] where a selector reads them.
        """
        embeds = self._embedding[prompt.input_ids].astype(self.dtype)
        result = {INPUTS_EMBEDS: embeds[None]}
        if layers := self._deepstack_layers(prompt):
            result[DEEPSTACK_EMBEDS] = np.zeros((layers, *embeds.shape), self.dtype)
        if prompt.pictures:
            seen = [self.features(picture) for picture in prompt.pictures]
            embeds[prompt.is_visual] = np.concatenate([part[IMAGE_FEATURES] for part in seen])
            for name, output in TOWER_OUTPUTS.items():
                if output in seen[0]:
                    result[name] = _at_visual(prompt, np.concatenate([part[output] for part in seen]))
            if DEEPSTACK_EMBEDS in result:
                deepstack_LND = np.concatenate([part[DEEPSTACK_FEATURES] for part in seen], axis=1)
                result[DEEPSTACK_EMBEDS][:, prompt.is_visual] = deepstack_LND
        return result

    def see(self, picture: Picture) -> np.ndarray:
        """Visual tokens [N, D] of one picture."""
        return self.features(picture)[IMAGE_FEATURES]

    def prefill(
        self, prompt: Prompt, num_keep: Sequence[int], embeds: Mapping[str, np.ndarray] | None = None
    ) -> PrefillRun[Cache]:
        """Run the prompt, keeping `num_keep` visual tokens after each stage; `embeds` is what `embed` gives."""
        feed = self._prompt_feed(prompt, num_keep, self.embed(prompt) if embeds is None else embeds)
        return self._prefilled(prompt, self._fill(prompt, feed))

    def _prompt_feed(
        self, prompt: Prompt, num_keep: Sequence[int], embeds: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Prefill's inputs, of which a graph takes some."""
        return {
            **embeds,
            POSITION_IDS: prompt.position_ids,
            TEXT_POSITIONS: prompt.text_positions,
            "visual_grid": prompt.visual_grid,
            NUM_KEEP: np.asarray(num_keep, np.int64),
        }

    def _prefilled(self, prompt: Prompt, result: Mapping[str, Any]) -> PrefillRun[Cache]:
        """The result of a prefill, made from its outputs."""
        kept = [result[kept_name(stage)] for stage in range(sum(map(is_kept, result)))]
        lengths = np.array([[len(prompt.input_ids)], *([len(rows)] for rows in kept)], np.int64)
        return PrefillRun(result[LOGITS][0], self._cache(past_of(result), lengths), kept)

    def _token_feed(self, tokens: Sequence[Sequence[int]], positions: Sequence[int]) -> dict[str, np.ndarray]:
        """Decode's inputs for text tokens [B, S], each row's first at its position, without the cache."""
        token_ids = np.asarray(tokens, np.int64)
        step = np.arange(token_ids.shape[1])
        return {
            INPUTS_EMBEDS: self._embedding[token_ids].astype(self.dtype),
            POSITION_IDS: np.tile(np.asarray(positions, np.int64)[:, None] + step, (self._axes, 1, 1)),
        }

    def step(self, cache: Cache, token: int, position: int) -> tuple[np.ndarray, Cache]:
        """Logits [V] after one more token of a batch of one, and the grown cache."""
        logits, cache = self.append(cache, [[token]], [position])
        return logits[0].copy(), cache


def _at_visual(prompt: Prompt, rows: np.ndarray) -> np.ndarray:
    """The rows of visual tokens as rows of all prompt tokens [T, ...], zero for text."""
    whole = np.zeros((len(prompt.input_ids), *rows.shape[1:]), rows.dtype)
    whole[prompt.is_visual] = rows
    return whole
