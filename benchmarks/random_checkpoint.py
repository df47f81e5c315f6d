"""Writes a checkpoint of true dimensions with random weights: sharded bf16 safetensors, one tensor in memory at a time.

python benchmarks/random_checkpoint.py qwen25vl-7b /tmp/qwen25vl-7b
"""

import argparse
import json
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from capa_export.families import qwen25vl
from capa_export.graph.decoder import decode_model
from capa_export.graph.rotary import rotary_tables

_TEXT = {"rms_norm_eps": 1e-6, "rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
_VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "window_size": 112}


def _config(
    hidden: int, inner: int, layers: int, heads: int, groups: int, *, vocab: int, tied: bool, **vision: int
) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        **_TEXT,
        "vision_config": {**_VISION, "out_hidden_size": hidden, **vision},
    }


CONFIGS = {
    "qwen25vl-3b": _config(2048, 11008, 36, 16, 2, vocab=151936, tied=True),
    "qwen25vl-7b": _config(3584, 18944, 28, 28, 4, vocab=152064, tied=False),
    # The 7B's layers and proportions at hidden size 1024: prefill fits a laptop.
    "qwen25vl-1024": _config(1024, 5376, 28, 8, 2, vocab=4096, tied=False, depth=2),
}


def shapes(config: dict[str, Any]) -> Iterator[tuple[str, list[int]]]:
    """Name and shape of every tensor, as the graphs want them."""
    dims = qwen25vl.model_dims(config)
    rotary, dtype = rotary_tables(dims), ir.DataType.BFLOAT16
    for model in (
        decode_model(dims.decoder, dtype, rotary, prune_layers=()),
        qwen25vl.vision_model(dims.vision, dtype),
    ):
        for name, value in model.graph.initializers.items():
            if value.const_value is None and not (dims.decoder.tie_word_embeddings and name == "lm_head.weight"):
                yield name, list(value.shape.numpy())
    yield "model.embed_tokens.weight", [dims.decoder.vocab_size, dims.decoder.hidden_size]


def write(config: dict[str, Any], folder: Path, shard_bytes: int = 4 << 30) -> None:
    """Write the folder, shard by shard."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    shards: list[list[tuple[str, list[int]]]] = [[]]
    size = 0
    for name, shape in shapes(config):
        if size + 2 * prod(shape) > shard_bytes and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append((name, shape))
        size += 2 * prod(shape)
    rng, weight_map = np.random.default_rng(0), {}
    for index, tensors in enumerate(shards, 1):
        file = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        header, offset = {}, 0
        for name, shape in tensors:
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + 2 * prod(shape)]}
            offset += 2 * prod(shape)
            weight_map[name] = file
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for _, shape in tensors:
                if len(shape) == 1:
                    out.write(np.ones(shape, ml_dtypes.bfloat16).tobytes())
                    continue
                for _ in range(shape[0]):
                    row = rng.standard_normal(prod(shape[1:]), dtype=np.float32) * (0.7 * shape[-1] ** -0.5)
                    out.write(row.astype(ml_dtypes.bfloat16).tobytes())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=CONFIGS)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    write(CONFIGS[arguments.model], arguments.out)
