"""Runs a bundle's ONNX files on ONNX Runtime's CPU provider.

T = prompt tokens, D = hidden size, V = vocabulary, K = tokens kept.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnxruntime

from capa_export.checkpoint import open_tensors
from capa_export.errors import CapaError
from capa_export.prompt import Picture, Prompt
from capa_export.widen import is_bfloat16, widen

__all__ = ["OnnxModel", "PrefillRun", "greedy"]

_PAST, _PRESENT = "past_key_values.", "present."
_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


@dataclass(frozen=True)
class PrefillRun:
    """What a prefill returned."""

    logits: np.ndarray
    """[V] FP32, last position."""
    cache: dict[str, np.ndarray]
    """Decode's past inputs by name."""
    kept: list[np.ndarray]
    """Prompt positions [K] that survive each stage, ascending."""


class OnnxModel:
    """The graphs of one `onnx/` folder and its embedding table; bf16 graphs compute in FP32 over their bf16 weights."""

    def __init__(self, folder: Path, *, prefill: str = "prefill.onnx", threads: int = 0) -> None:
        self.folder, self.threads = folder, threads
        self.prefill_file = prefill
        self._scratch = TemporaryDirectory(prefix="capa-export-")

    def _session(self, file: str) -> Any:
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
        try:
            return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's exceptions share no public base class.
            raise CapaError(f"{path}: ONNX Runtime cannot load it: {str(error).splitlines()[0]}") from error

    @cached_property
    def _visual(self) -> Any:
        return self._session("visual/model.onnx")

    @cached_property
    def _prefill(self) -> Any:
        return self._session(f"llm/{self.prefill_file}")

    @cached_property
    def _decode(self) -> Any:
        return self._session("llm/decode.onnx")

    def load(self) -> None:
        """Open everything now, so that nothing is timed twice."""
        _ = self._visual, self._prefill, self._decode, self._embedding

    @cached_property
    def _embedding(self) -> np.ndarray:
        """[V, D], mapped from the file rather than read."""
        tensor = open_tensors(self.folder / "llm" / "embedding.safetensors")["embedding"]
        return np.memmap(tensor.path, tensor.dtype.numpy(), "r", tensor.offset, tensor.shape)

    @cached_property
    def dtype(self) -> type[np.floating[Any]]:
        """Dtype of the activations."""
        name = self._prefill.get_inputs()[0].type
        if name not in _DTYPES:
            raise CapaError(
                f"{self.folder}: ONNX Runtime's CPU provider does not run {name}; build with --precision fp16"
            )
        return _DTYPES[name]

    @cached_property
    def _axes(self) -> int:
        """Rows of the position ids."""
        inputs = {entry.name: entry for entry in self._decode.get_inputs()}
        return inputs["position_ids"].shape[0]

    def embed(self, prompt: Prompt) -> np.ndarray:
        """Input embeddings [1, T, D]: the table's rows, and the vision tower's output where pictures stand."""
        embeds = self._embedding[prompt.input_ids].astype(self.dtype)
        if prompt.pictures:
            embeds[prompt.is_visual] = np.concatenate([self.see(picture) for picture in prompt.pictures])
        return embeds[None]

    def see(self, picture: Picture) -> np.ndarray:
        """Visual tokens [N, D] of one picture."""
        return self._visual.run(None, {"pixel_values": picture.patches.astype(self.dtype)})[0]

    def prefill(self, prompt: Prompt, num_keep: Sequence[int], embeds: np.ndarray | None = None) -> PrefillRun:
        """Run the prompt, keeping `num_keep` visual tokens after each stage."""
        feed = {
            "inputs_embeds": self.embed(prompt) if embeds is None else embeds,
            "position_ids": prompt.position_ids,
            "text_positions": prompt.text_positions,
            "num_keep": np.asarray(num_keep, np.int64),
        }
        result = _run(self._prefill, {entry.name: feed[entry.name] for entry in self._prefill.get_inputs()})
        kept = [result[f"kept_positions.{stage}"] for stage in range(len(num_keep))]
        return PrefillRun(result["logits"][0], _past(result), kept)

    def append(
        self, cache: Mapping[str, np.ndarray], tokens: Sequence[int], position: int
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Logits [V] after more text tokens, the first at `position`, and the grown cache."""
        embeds = self._embedding[list(tokens)].astype(self.dtype)[None]
        position_ids = np.tile(np.arange(position, position + len(tokens), dtype=np.int64), (self._axes, 1))
        result = _run(self._decode, {"inputs_embeds": embeds, "position_ids": position_ids, **cache})
        return result["logits"][0], _past(result)

    def step(
        self, cache: Mapping[str, np.ndarray], token: int, position: int
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """`append` of a single token."""
        return self.append(cache, [token], position)


def _run(session: Any, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    names = [entry.name for entry in session.get_outputs()]
    return dict(zip(names, session.run(names, feed), strict=True))


def _past(result: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {_PAST + name.removeprefix(_PRESENT): value for name, value in result.items() if name.startswith(_PRESENT)}


def greedy(model: OnnxModel, prompt: Prompt, prefill: PrefillRun, stop: Sequence[int], limit: int) -> Iterator[int]:
    """Up to `limit` tokens, each the likeliest, until one of `stop`."""
    logits, cache = prefill.logits, prefill.cache
    for count in range(limit):
        token = int(logits.argmax())
        if token in stop:
            return
        yield token
        if count + 1 < limit:
            logits, cache = model.step(cache, token, prompt.next_position + count)
