"""Generates with a bundle's graphs: what every runtime does alike, and ONNX Runtime's CPU provider.

B = batch, T = prompt tokens, D = hidden size, V = vocabulary, K = tokens kept, G = KV heads, d = head size.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Generic, TypeVar

import numpy as np
import onnx
import onnxruntime

from capa_export.errors import CapaError
from capa_export.in_place import embedding_of
from capa_export.prompt import Picture, Prompt
from capa_export.selectors import TOWER_OUTPUTS
from capa_export.tiled import attention_bytes, tiled
from capa_export.widen import is_bfloat16, widen

__all__ = ["KVCache", "Model", "OnnxModel", "PrefillRun", "greedy"]

Cache = TypeVar("Cache")
_PAST, _PRESENT = "past_key_values.", "present."
_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
_ATTENTION_LIMIT = 1 << 30
"""Bytes of attention weights up to which the graphs run as they are shipped."""


@dataclass(frozen=True)
class KVCache:
    """Keys and values of a batch of prompts; shorter rows are padded in front, so that new tokens go behind all."""

    tensors: dict[str, np.ndarray]
    """Decode's past inputs by name, [B, G, P, d] each."""
    lengths: np.ndarray
    """[1 + stages, B] int64: rows that are a prompt's own, before the first stage and behind each."""

    @classmethod
    def stacked(cls, caches: "Sequence[KVCache]") -> "KVCache":
        """One batch of several."""
        names = caches[0].tensors
        tensors = {name: _stacked([cache.tensors[name] for cache in caches]) for name in names}
        return cls(tensors, np.concatenate([cache.lengths for cache in caches], axis=1))


def _stacked(rows: Sequence[np.ndarray]) -> np.ndarray:
    longest = max(row.shape[2] for row in rows)
    return np.concatenate([np.pad(row, ((0, 0), (0, 0), (longest - row.shape[2], 0), (0, 0))) for row in rows])


@dataclass(frozen=True)
class PrefillRun(Generic[Cache]):
    """What a prefill returned."""

    logits: np.ndarray
    """[V] FP32, last position."""
    cache: Cache
    kept: list[np.ndarray]
    """Prompt positions [K] that survive each stage, ascending."""


class Model(ABC, Generic[Cache]):
    """A bundle's graphs as one runtime runs them, and its embedding table."""

    folder: Path
    """The bundle's `onnx` folder."""

    @property
    def device(self) -> dict[str, Any]:
        """What there is to say about where it runs, if that is not this machine's processor."""
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
        """One batch of several caches, for answers of up to `new_tokens`."""

    @abstractmethod
    def append(
        self, cache: Cache, tokens: Sequence[Sequence[int]], positions: Sequence[int]
    ) -> tuple[np.ndarray, Cache]:
        """Logits [B, V] after more text tokens [B, S], each row's first at its position, and the grown cache."""

    @cached_property
    def _embedding(self) -> np.ndarray:
        """[V, D], mapped from the file rather than read."""
        tensor = embedding_of(self.folder / "llm")
        return np.memmap(tensor.path, tensor.dtype.numpy(), "r", tensor.offset, tensor.shape)

    def embed(self, prompt: Prompt) -> dict[str, np.ndarray]:
        """Prefill's inputs that hold embeddings: the table's rows, and the vision tower's output at visual tokens.

        inputs_embeds [1, T, D]; deepstack_embeds [layers, T, D] where the decoder has DeepStack layers;
        visual_saliency [T] and visual_features [T, F] where a selector reads them.
        """
        embeds = self._embedding[prompt.input_ids].astype(self.dtype)
        result = {"inputs_embeds": embeds[None]}
        if layers := self._deepstack_layers(prompt):
            result["deepstack_embeds"] = np.zeros((layers, *embeds.shape), self.dtype)
        if prompt.pictures:
            seen = [self.features(picture) for picture in prompt.pictures]
            embeds[prompt.is_visual] = np.concatenate([part["image_features"] for part in seen])
            for name, output in TOWER_OUTPUTS.items():
                if output in seen[0]:
                    result[name] = _at_visual(prompt, np.concatenate([part[output] for part in seen]))
            if "deepstack_embeds" in result:
                deepstack_LND = np.concatenate([part["deepstack_features"] for part in seen], axis=1)
                result["deepstack_embeds"][:, prompt.is_visual] = deepstack_LND
        return result

    def see(self, picture: Picture) -> np.ndarray:
        """Visual tokens [N, D] of one picture."""
        return self.features(picture)["image_features"]

    def prefill(
        self, prompt: Prompt, num_keep: Sequence[int], embeds: Mapping[str, np.ndarray] | None = None
    ) -> PrefillRun[Cache]:
        """Run the prompt, keeping `num_keep` visual tokens after each stage; `embeds` is what `embed` gives."""
        feed = {
            **(self.embed(prompt) if embeds is None else embeds),
            "position_ids": prompt.position_ids,
            "text_positions": prompt.text_positions,
            "visual_grid": prompt.visual_grid,
            "num_keep": np.asarray(num_keep, np.int64),
        }
        result = self._fill(prompt, feed)
        kept = [result[f"kept_positions.{stage}"] for stage in range(len(num_keep))]
        lengths = np.array([[len(prompt.input_ids)], *([len(rows)] for rows in kept)], np.int64)
        return PrefillRun(result["logits"][0], self._cache(_past(result), lengths), kept)

    def _token_feed(self, tokens: Sequence[Sequence[int]], positions: Sequence[int]) -> dict[str, np.ndarray]:
        """Decode's inputs for text tokens [B, S], each row's first at its position, without the cache."""
        token_ids = np.asarray(tokens, np.int64)
        step = np.arange(token_ids.shape[1])
        return {
            "inputs_embeds": self._embedding[token_ids].astype(self.dtype),
            "position_ids": np.tile(np.asarray(positions, np.int64)[:, None] + step, (self._axes, 1, 1)),
        }

    def step(self, cache: Cache, token: int, position: int) -> tuple[np.ndarray, Cache]:
        """Logits [V] after one more token of a batch of one, and the grown cache."""
        logits, cache = self.append(cache, [[token]], [position])
        return logits[0], cache


def _at_visual(prompt: Prompt, rows: np.ndarray) -> np.ndarray:
    """One row a prompt token [T, ...], zero for text."""
    whole = np.zeros((len(prompt.input_ids), *rows.shape[1:]), rows.dtype)
    whole[prompt.is_visual] = rows
    return whole


class OnnxModel(Model[KVCache]):
    """The graphs of one `onnx/` folder on the CPU; bf16 graphs compute in FP32 over their bf16 weights."""

    def __init__(self, folder: Path, *, prefill: str = "prefill.onnx", threads: int = 0) -> None:
        self.folder, self.threads = folder, threads
        self.prefill_file = prefill
        self._scratch = TemporaryDirectory(prefix="capa-export-")
        self._sessions: dict[str, tuple[Any, bool]] = {}
        """File -> session, and whether its attention runs in tiles."""
        self._attention: dict[tuple[str, object], int] = {}

    def _opened(self, file: str, shapes: Mapping[str, tuple[int, ...]] | None = None) -> Any:
        """The session of a graph; from the first inputs on that are too large for it, one with attention in tiles."""
        session, in_tiles = self._sessions.get(file, (None, False))
        if shapes is not None and not in_tiles and self._attention_bytes(file, shapes) > _ATTENTION_LIMIT:
            # Not both at once: each may hold a copy of the weights.
            self._sessions.pop(file, None)
            session, in_tiles = None, True
        if session is None:
            session = self._session(file, in_tiles=in_tiles)
            self._sessions[file] = session, in_tiles
        return session

    def _attention_bytes(self, file: str, shapes: Mapping[str, tuple[int, ...]]) -> int:
        key = file, tuple(shapes.items())
        if key not in self._attention:
            self._attention[key] = attention_bytes(onnx.load(self.folder / file, load_external_data=False), shapes)
        return self._attention[key]

    def _session(self, file: str, *, in_tiles: bool = False) -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        # Errors come as exceptions; the log would say them a second time.
        options.log_severity_level = 4
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        path = self.folder / file
        if is_bfloat16(path):
            widened = Path(self._scratch.name) / file
            widen(path, widened)
            path = widened
        source = str(path)
        changes = [*([tiled] if in_tiles else []), *self._changes(file)]
        if changes:
            model = onnx.load(path, load_external_data=False)
            for change in changes:
                model = change(model)
            source = model.SerializeToString()
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
        try:
            return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's exceptions share no public base class.
            raise CapaError(f"{path}: ONNX Runtime cannot load it: {str(error).splitlines()[0]}") from error

    def _changes(self, file: str) -> Sequence[Callable[[onnx.ModelProto], onnx.ModelProto]]:  # noqa: ARG002
        """What to do to a graph before it is run; nothing, unless one wants to look inside."""
        return ()

    def _visual(self, picture: Picture) -> Any:
        return self._opened("visual/model.onnx", {"pixel_values": picture.patches.shape})

    def _prefill(self, prompt: Prompt) -> Any:
        shapes = {"inputs_embeds": (1, len(prompt.input_ids)), "position_ids": prompt.position_ids.shape}
        return self._opened(f"llm/{self.prefill_file}", {**shapes, "text_positions": prompt.text_positions.shape})

    @property
    def _decode(self) -> Any:
        return self._opened("llm/decode.onnx")

    def load(self, prompt: Prompt) -> None:
        for picture in prompt.pictures:
            self._visual(picture)
        _ = self._prefill(prompt), self._decode, self._embedding

    @cached_property
    def dtype(self) -> type[np.floating[Any]]:
        name = self._decode.get_inputs()[0].type
        if name not in _DTYPES:
            raise CapaError(
                f"{self.folder}: ONNX Runtime's CPU provider does not run {name}; build with --precision fp16"
            )
        return _DTYPES[name]

    @cached_property
    def _axes(self) -> int:
        inputs = {entry.name: entry for entry in self._decode.get_inputs()}
        return inputs["position_ids"].shape[0]

    def _deepstack_layers(self, prompt: Prompt) -> int:
        entries = self._prefill(prompt).get_inputs()
        return next((entry.shape[0] for entry in entries if entry.name == "deepstack_embeds"), 0)

    def features(self, picture: Picture) -> dict[str, np.ndarray]:
        return _run(self._visual(picture), {"pixel_values": picture.patches.astype(self.dtype)})

    def _fill(self, prompt: Prompt, feed: Mapping[str, np.ndarray]) -> dict[str, Any]:
        session = self._prefill(prompt)
        # Where no picture is shown, the tower has said nothing.
        empty = {
            entry.name: np.zeros([len(prompt.input_ids), *entry.shape[1:]], _DTYPES[entry.type])
            for entry in session.get_inputs()
            if entry.name in TOWER_OUTPUTS and entry.name not in feed
        }
        return _run(session, {entry.name: {**feed, **empty}[entry.name] for entry in session.get_inputs()})

    def _cache(self, past: dict[str, Any], lengths: np.ndarray) -> KVCache:
        return KVCache(past, lengths)

    def batch(self, caches: Sequence[KVCache], new_tokens: int) -> KVCache:  # noqa: ARG002 - it grows by itself.
        return KVCache.stacked(caches)

    def append(
        self, cache: KVCache, tokens: Sequence[Sequence[int]], positions: Sequence[int]
    ) -> tuple[np.ndarray, KVCache]:
        feed = self._token_feed(tokens, positions)
        result = self._append({**feed, "past_lengths": cache.lengths, **cache.tensors})
        return result["logits"], KVCache(_past(result), cache.lengths + feed["inputs_embeds"].shape[1])

    def _append(self, feed: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Decode's outputs."""
        return _run(self._decode, feed)


def _run(session: Any, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    names = [entry.name for entry in session.get_outputs()]
    return dict(zip(names, session.run(names, feed), strict=True))


def _past(result: Mapping[str, Any]) -> dict[str, Any]:
    return {_PAST + name.removeprefix(_PRESENT): value for name, value in result.items() if name.startswith(_PRESENT)}


def greedy(
    model: Model[Cache],
    prompts: Sequence[Prompt],
    runs: Sequence[PrefillRun[Cache]],
    stop: Sequence[int],
    limit: int,
) -> Iterator[list[int | None]]:
    """Up to `limit` tokens of each prompt, each the likeliest, until one of `stop`; None where an answer has ended."""
    logits, cache = np.stack([run.logits for run in runs]), model.batch([run.cache for run in runs], limit)
    ended = np.zeros(len(prompts), bool)
    for count in range(limit):
        tokens = logits.argmax(-1)
        ended |= np.isin(tokens, stop)
        if ended.all():
            return
        yield [None if over else int(token) for token, over in zip(tokens, ended, strict=True)]
        if count + 1 < limit:
            positions = [prompt.next_position + count for prompt in prompts]
            logits, cache = model.append(cache, tokens[:, None].tolist(), positions)
