"""Faults to plant in a healthy `onnx/` folder, each of a size of one's choice."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from safetensors.numpy import load_file, save_file

from tests.parity.graph_faults import attention, tokens, weights
from tests.parity.graph_faults.edit import mixed

__all__ = ["FAULTS", "HARMLESS", "KINDS", "Fault"]

_ALL = math.inf
_PREFILL, _DECODE, _VISUAL = "llm/prefill.onnx", "llm/decode.onnx", "visual/model.onnx"


@dataclass(frozen=True)
class Fault:
    """One way in which a bundle can be wrong."""

    file: str
    """In the `onnx` folder."""
    plant: Callable[[Any, float], str]
    """Changes the graph, or the file where that is none, by a size; returns the node that is then wrong, if any."""
    unit: str
    """What the size counts."""
    whole: float
    least: float
    """Smallest size there is to try."""

    @property
    def name(self) -> str:
        return f"{self.file.split('/')[-1].split('.')[0]}-{self.plant.__name__}".replace("model-", "visual-")

    def into(self, folder: Path, size: float | None = None) -> str:
        """Plant it in a copy of a healthy `onnx` folder; returns the node that is then wrong, or nothing."""
        path = folder / self.file
        size = self.whole if size is None else size
        if path.suffix != ".onnx":
            return self.plant(path, size)
        model = ir.load(path)
        place = self.plant(model, size)
        ir.save(model, path)
        return place


def words_swapped(path: Path, size: float) -> str:
    """Pairs of words of the tokenizer have each other's number."""
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    words = [word for word in vocabulary if word not in {token["content"] for token in tokenizer["added_tokens"]}]
    pairs = list(zip(words[::2], words[1::2], strict=False))
    for a, b in pairs[: int(min(size, len(pairs)))]:
        vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    return ""


def image_mean_off(path: Path, size: float) -> str:
    """By so many of 255."""
    processor = json.loads(path.read_text(encoding="utf-8"))
    processor["image_mean"] = [mean + size / 255 for mean in processor["image_mean"]]
    path.write_text(json.dumps(processor), encoding="utf-8")
    return ""


def embedding_rows_shifted(path: Path, size: float) -> str:
    """Some tokens have the next one's embedding."""
    table = load_file(path)["embedding"]
    save_file({"embedding": mixed(table, np.roll(table, -1, axis=0), size)}, path)
    return ""


FAULTS = (
    Fault(_PREFILL, tokens.alpha_dropped, "channels", _ALL, 1),
    Fault(_PREFILL, tokens.alpha_of_another_layer, "channels", _ALL, 1),
    Fault(_PREFILL, tokens.text_rows_not_merged, "text tokens", _ALL, 1),
    Fault(_PREFILL, tokens.gather_off_by_one, "visual tokens", _ALL, 1),
    Fault(_PREFILL, tokens.rotary_not_gathered, "visual tokens", _ALL, 1),
    Fault(_PREFILL, tokens.cache_not_gathered, "visual tokens", _ALL, 1),
    Fault(_PREFILL, tokens.kept_unsorted, "visual tokens", _ALL, 2),
    Fault(_PREFILL, tokens.kept_too_few, "tokens", 2, 1),
    Fault(_PREFILL, tokens.score_without_output_weight, "share", 1.0, 1e-4),
    Fault(_PREFILL, tokens.score_over_visual_keys, "nats", 1e4, 1e-4),
    Fault(_PREFILL, tokens.wrong_score_layer, "layers", 1, 1),
    Fault(_PREFILL, attention.heads_swapped, "channels", _ALL, 1),
    Fault(_DECODE, attention.heads_swapped, "channels", _ALL, 1),
    Fault(_PREFILL, attention.output_weight_transposed, "rows", _ALL, 2),
    Fault(_PREFILL, attention.kv_group_off_by_one, "channels", _ALL, 1),
    Fault(_PREFILL, attention.causal_mask_lost, "tokens ahead", _ALL, 1),
    Fault(_PREFILL, attention.attention_scale_off, "share", 1.0, 1e-5),
    Fault(_PREFILL, attention.mrope_rows_swapped, "frequencies", _ALL, 1),
    Fault(_PREFILL, attention.frequencies_off, "share", 0.5, 1e-6),
    Fault(_DECODE, attention.positions_from_pruned_length, "positions", _ALL, 1),
    Fault(_DECODE, attention.cache_hidden, "tokens", 4, 1),
    Fault(_PREFILL, weights.norm_epsilon, "times epsilon", 1e5, 1e-2),
    Fault(_DECODE, weights.norm_epsilon, "times epsilon", 1e5, 1e-2),
    Fault(_PREFILL, weights.bias_dropped, "channels", _ALL, 1),
    Fault(_DECODE, weights.bias_dropped, "channels", _ALL, 1),
    Fault(_PREFILL, weights.tile_negated, "rows and columns", _ALL, 1),
    Fault(_DECODE, weights.tile_negated, "rows and columns", _ALL, 1),
    Fault(_PREFILL, weights.tile_off, "share", 100.0, 1e-4),
    Fault(_PREFILL, weights.nan_weight, "weights", 1, 1),
    Fault(_DECODE, weights.nan_weight, "weights", 1, 1),
    Fault(_PREFILL, weights.residual_lost, "channels", _ALL, 1),
    Fault(_PREFILL, weights.head_rows_shifted, "tokens", _ALL, 1),
    Fault(_VISUAL, weights.vision_channels_shifted, "channels", _ALL, 1),
    Fault(_VISUAL, weights.vision_heads_swapped, "channels", _ALL, 1),
    Fault(_VISUAL, weights.vision_bias_dropped, "channels", _ALL, 1),
    Fault(_VISUAL, weights.vision_norm_epsilon, "times epsilon", 1e7, 1e-2),
    Fault("llm/embedding.safetensors", embedding_rows_shifted, "tokens", _ALL, 1),
    Fault("llm/tokenizer.json", words_swapped, "pairs of words", _ALL, 1),
    Fault("visual/preprocessor_config.json", image_mean_off, "1/255", 255, 1e-3),
)
"""Of a Qwen2.5-VL with a stage and two linear layers."""

KINDS = [*{fault.plant: fault for fault in reversed(FAULTS)}.values()]
"""Each kind in the first file that has it; what decode repeats of prefill waits for `make test-all`."""

HARMLESS = (
    Fault(_PREFILL, tokens.last_alpha_dropped, "channels", _ALL, 1),
    Fault(_PREFILL, attention.last_causal_mask_lost, "tokens ahead", _ALL, 1),
)
"""No output depends on them: of the last layer's hidden states, only the last token's is read."""
