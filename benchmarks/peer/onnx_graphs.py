"""Decoder graphs with one cache length for all layers, as mobius-onnx and onnxruntime-genai write them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from serve import DECODE, THREADS, Feed, Prefills

__all__ = ["DecoderSession", "prefills", "session"]


def session(path: Path, **settings: str) -> Any:
    """A session on the CPU, with settings of ONNX Runtime's by the last part of their names."""
    options = onnxruntime.SessionOptions()
    for name, value in settings.items():
        options.add_session_config_entry(f"session.{name}", value)
    options.intra_op_num_threads = THREADS
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


class DecoderSession:
    """Feeds a decoder graph by the names that both exporters use."""

    def __init__(self, path: Path) -> None:
        self.session = session(path)
        self.inputs = {entry.name: entry for entry in self.session.get_inputs()}
        self.outputs = [entry.name for entry in self.session.get_outputs()]

    def empty_cache(self, head_dim: int) -> dict[str, np.ndarray]:
        """Keys and values of no token."""
        return {
            name: np.zeros((1, entry.shape[1], 0, head_dim), np.float32)
            for name, entry in self.inputs.items()
            if name.startswith("past_key_values.")
        }

    def __call__(
        self, embeds: np.ndarray, positions: np.ndarray, cache: Mapping[str, np.ndarray], num_past: int
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Logits [V] of the last position and the grown cache; positions are [axes, T]."""
        feed = {
            "inputs_embeds": embeds,
            "attention_mask": np.ones((1, num_past + embeds.shape[1]), np.int64),
            "position_ids": positions[:, None] if len(positions) > 1 else positions,
            **cache,
        }
        values = self.session.run(self.outputs, {name: feed[name] for name in self.inputs})
        result = dict(zip(self.outputs, values, strict=True))
        grown = {
            "past_key_values" + name.removeprefix("present"): value
            for name, value in result.items()
            if name.startswith("present")
        }
        return result["logits"][0, -1], grown


def prefills(path: Path, head_dim: int, feed: Feed) -> Prefills:
    """A dense prefill of the graph at `path`, and a step of decode behind it."""
    decoder = DecoderSession(path)
    cache = decoder.empty_cache(head_dim)
    embeds, positions = feed["inputs_embeds"], feed["position_ids"]
    _, filled = decoder(embeds, positions, cache, 0)
    step = embeds[:, -1:], positions[:, -1:] + 1, filled, embeds.shape[1]
    return {"dense": lambda: decoder(embeds, positions, cache, 0)[0], f"{DECODE}dense": lambda: decoder(*step)[0]}
