"""Attacks on the files beside a checkpoint's weights."""

from collections.abc import Iterator
from itertools import cycle
from typing import Any

from tests.attacks.victims import Attack, Victim, beginning

__all__ = ["KEYS", "SIZES", "TYPES", "TYPES_OF_VALUES"]


def _config(*path: str, to: Any, command: str = "export", file: str = "config.json") -> Attack:
    def attack(victim: Victim) -> list[object]:
        def change(data: Any) -> None:
            for key in path[:-1]:
                data = data.setdefault(key, {})
            data[path[-1]] = to

        return getattr(victim, command)(victim.checkpoint_with(file, change))

    return attack


def _text(key: str, to: Any, command: str = "export") -> Attack:
    return _config("text_config", key, to=to, command=command)


def _vision(key: str, to: Any, command: str = "export") -> Attack:
    return _config("vision_config", key, to=to, command=command)


def _processor(key: str, to: Any, command: str = "export") -> Attack:
    return _config(key, to=to, command=command, file="preprocessor_config.json")


_BIG = 10**9

SIZES: dict[str, Attack] = {
    **{
        f"{command}: {key} {value}": _text(key, value, command)
        for command in ("export", "plan")
        for key, value in {
            "num_hidden_layers": _BIG,
            "hidden_size": 10**12,
            "intermediate_size": 10**15,
            "num_attention_heads": 64,
            "vocab_size": 10**12,
            "max_position_embeddings": 10**18,
            "head_dim": 10**9,
        }.items()
    },
    **{
        f"{command}: vision {key} {value}": _vision(key, value, command)
        for command in ("export", "plan")
        for key, value in {
            "depth": _BIG,
            "patch_size": 10**6,
            "temporal_patch_size": 10**6,
            "spatial_merge_size": 10**6,
            "window_size": 10**12,
            "in_channels": 10**9,
            "num_heads": 8,
            "intermediate_size": 10**15,
        }.items()
    },
    **{
        f"{command}: processor {key} {beginning(value)}": _processor(key, value, command)
        for command in ("export", "plan")
        for key, value in {
            "patch_size": 10**6,
            "merge_size": 10**6,
            "temporal_patch_size": 10**6,
            "size": {"shortest_edge": 10**12, "longest_edge": 10**13},
            "image_mean": [0.5] * 10**6,
        }.items()
    },
    "image token": _config("image_token_id", to=10**30),
    "mrope": _config("text_config", "rope_parameters", "mrope_section", to=[10**9, 0, 0]),
    "fullatt": _vision("fullatt_block_indexes", list(range(10**6))),
}

TYPES_OF_VALUES = {
    "list": [1],
    "text": "5",
    "boolean": True,
    "object": {"a": 1},
    "surrogate": "\ud800",
    "markup": "[red]x[/red]",
    "infinite": float("inf"),
    "nan": float("nan"),
    "number of 400 digits": 10**400,
    "negative": -1,
    "escape": "\x1b[2J\x1b]0;owned\x07",
}
KEYS: dict[str, tuple[tuple[str, ...], str]] = {
    "model_type": (("model_type",), "config.json"),
    "text model_type": (("text_config", "model_type"), "config.json"),
    "layer_types": (("text_config", "layer_types"), "config.json"),
    "rope_theta": (("text_config", "rope_parameters", "rope_theta"), "config.json"),
    "rope_type": (("text_config", "rope_parameters", "rope_type"), "config.json"),
    "rope_parameters": (("text_config", "rope_parameters"), "config.json"),
    "rms_norm_eps": (("text_config", "rms_norm_eps"), "config.json"),
    "max_window_layers": (("text_config", "max_window_layers"), "config.json"),
    "sliding_window": (("text_config", "sliding_window"), "config.json"),
    "attention_dropout": (("text_config", "attention_dropout"), "config.json"),
    "pad_token_id": (("text_config", "pad_token_id"), "config.json"),
    "architectures": (("architectures",), "config.json"),
    "dtype": (("dtype",), "config.json"),
    "quantization_config": (("quantization_config",), "config.json"),
    "torch_dtype": (("torch_dtype",), "config.json"),
    "auto_map": (("auto_map",), "config.json"),
    "vision_config": (("vision_config",), "config.json"),
    "vision model_type": (("vision_config", "model_type"), "config.json"),
    "tokens_per_second": (("vision_config", "tokens_per_second"), "config.json"),
    "transformers_version": (("transformers_version",), "config.json"),
    "transformers_weights": (("transformers_weights",), "config.json"),
    "image_mean": (("image_mean",), "preprocessor_config.json"),
    "size": (("size",), "preprocessor_config.json"),
    "resample": (("resample",), "preprocessor_config.json"),
    "do_resize": (("do_resize",), "preprocessor_config.json"),
    "rescale_factor": (("rescale_factor",), "preprocessor_config.json"),
    "image_processor_type": (("image_processor_type",), "preprocessor_config.json"),
    "tokenizer_class": (("tokenizer_class",), "tokenizer_config.json"),
    "model_max_length": (("model_max_length",), "tokenizer_config.json"),
    "eos_token": (("eos_token",), "tokenizer_config.json"),
    "padding_side": (("padding_side",), "tokenizer_config.json"),
    "eos_token_id": (("eos_token_id",), "generation_config.json"),
    "temperature": (("temperature",), "generation_config.json"),
}


def _types() -> Iterator[tuple[str, Attack]]:
    """Every key is read by both commands with two values each; which of them goes round."""
    values = cycle(TYPES_OF_VALUES.items())
    for key, (path, file) in KEYS.items():
        for command in ("export", "calibrate") * 2:
            kind, value = next(values)
            yield f"{command}: {key} {kind}", _config(*path, to=value, command=command, file=file)


TYPES = dict(_types())
