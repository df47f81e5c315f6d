"""Writes a checkpoint of true dimensions with random weights: sharded bf16 safetensors, a piece of a tensor at a time.

python benchmarks/random_checkpoint.py qwen25vl-7b /tmp/qwen25vl-7b

With --tokenizer it is laid out as it is published, as benchmarks/published.py says; with --awq the decoder's layers
are in AutoAWQ's layout, four bits in groups of 128.
"""

import argparse
import json
import re
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
import transformers

_PIECE = 1 << 22
_DECODER_LINEAR = re.compile(
    r"(?!visual|vision).*layers\.\d+\.(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)\.weight"
)
_GROUP = 128
_AWQ = {
    "quant_method": "awq",
    "version": "gemm",
    "bits": 4,
    "group_size": _GROUP,
    "zero_point": True,
    "modules_to_not_convert": ["visual", "vision_tower", "multi_modal_projector"],
}
_BYTES = {"BF16": 2, "F16": 2, "I32": 4}
Tensor = tuple[str, str, list[int]]
"""Name, type and shape."""


def _qwen25vl(
    hidden: int, inner: int, layers: int, heads: int, groups: int, *, vocab: int, tied: bool, **vision: Any
) -> dict[str, Any]:
    tower = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "window_size": 112}
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
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vision_config": {**tower, "out_hidden_size": hidden, **vision},
    }


def _qwen3vl(hidden: int, inner: int, layers: int, heads: int, *, tied: bool, **vision: Any) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "tie_word_embeddings": tied,
        "text_config": {
            "model_type": "qwen3_vl_text",
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "max_position_embeddings": 262144,
            "rms_norm_eps": 1e-6,
            "rope_theta": 5e6,
            "rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True},
            "tie_word_embeddings": tied,
        },
        "vision_config": {"model_type": "qwen3_vl", "out_hidden_size": hidden, **vision},
    }


_SMALLER_TOWER: dict[str, Any] = {
    "depth": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "deepstack_visual_indexes": [5, 11, 17],
}
"""Of Qwen3-VL-2B and 4B; the 8B's is what transformers has by default."""


def _internvl3(hidden: int, inner: int, layers: int, heads: int, groups: int) -> dict[str, Any]:
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "image_token_id": 151667,
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "qwen2",
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": groups,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "rope_scaling": {"factor": 2.0, "rope_type": "dynamic"},
            "rope_theta": 1e6,
            "tie_word_embeddings": False,
            "vocab_size": 151674,
        },
        "vision_config": {
            "model_type": "internvl_vision",
            "attention_bias": True,
            "hidden_size": 1024,
            "image_size": [448, 448],
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": [14, 14],
        },
    }


CONFIGS = {
    "qwen25vl-3b": _qwen25vl(2048, 11008, 36, 16, 2, vocab=151936, tied=True),
    "qwen25vl-7b": _qwen25vl(3584, 18944, 28, 28, 4, vocab=152064, tied=False),
    # The 7B's layers and proportions, narrower: prefill fits a laptop.
    "qwen25vl-1024": _qwen25vl(1024, 5376, 28, 8, 2, vocab=4096, tied=False, depth=2),
    "qwen25vl-512": _qwen25vl(512, 2688, 28, 4, 1, vocab=4096, tied=False, depth=2),
    # The 7B's proportions, its tower's share of the work and its vocabulary: a whole answer takes seconds.
    "qwen25vl-whole": _qwen25vl(
        *(512, 2688, 12, 4, 1),
        vocab=151936,
        tied=True,
        depth=8,
        hidden_size=320,
        intermediate_size=856,
        num_heads=4,
        fullatt_block_indexes=[7],
    ),
    "qwen3vl-2b": _qwen3vl(2048, 6144, 28, 16, tied=True, **_SMALLER_TOWER),
    "qwen3vl-4b": _qwen3vl(2560, 9728, 36, 32, tied=True, **_SMALLER_TOWER),
    "qwen3vl-8b": _qwen3vl(4096, 12288, 36, 32, tied=False),
    "llava15-7b": {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": 32000,
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "llama",
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "vocab_size": 32064,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 1024,
            "image_size": 336,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
            "projection_dim": 768,
            "vocab_size": 32000,
        },
    },
    "internvl3-1b": _internvl3(896, 4864, 24, 14, 2),
    "internvl3-2b": _internvl3(1536, 8960, 28, 12, 2),
    "internvl3-8b": _internvl3(3584, 18944, 28, 28, 4),
}


def shapes(config: dict[str, Any]) -> list[tuple[str, list[int]]]:
    """Name and shape of every tensor, as published checkpoints hold them; a tied head is held once."""
    architecture = getattr(transformers, config["architectures"][0])
    with torch.device("meta"):
        model = architecture(architecture.config_class.from_dict(config))
    tied = model.all_tied_weights_keys
    tensors = [(name, list(tensor.shape)) for name, tensor in model.state_dict().items() if name not in tied]
    return [(_published(name, config["model_type"]), shape) for name, shape in tensors]


def _published(name: str, model_type: str) -> str:
    """The name under which the authors' checkpoints hold a tensor."""
    if model_type == "qwen3_vl":
        return name
    rules = [(r"^model\.language_model\.", "model."), (r"^model\.visual\.", "visual.")]
    if model_type != "qwen2_5_vl":
        rules = [
            (r"^model\.language_model\.", "language_model.model."),
            (r"^lm_head\.", "language_model.lm_head."),
            (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
        ]
    for pattern, replacement in rules:
        name, count = re.subn(pattern, replacement, name)
        if count:
            break
    return name


def _stored(name: str, shape: list[int], *, awq: bool) -> list[Tensor]:
    """The tensors that stand for one: itself, or a decoder's weight [out, in] in AutoAWQ's three parts."""
    if not awq or not _DECODER_LINEAR.fullmatch(name):
        return [(name, "BF16", shape)]
    (outputs, inputs), module = shape, name.removesuffix("weight")
    groups = inputs // _GROUP
    parts = {"qweight": [inputs, outputs // 8], "qzeros": [groups, outputs // 8], "scales": [groups, outputs]}
    return [(module + part, "F16" if part == "scales" else "I32", size) for part, size in parts.items()]


def _size(tensor: Tensor) -> int:
    _, dtype, shape = tensor
    return _BYTES[dtype] * prod(shape)


def write(config: dict[str, Any], folder: Path, shard_bytes: int = 4 << 30, *, awq: bool = False) -> None:
    """Write the folder, shard by shard."""
    folder.mkdir(parents=True, exist_ok=True)
    written = {**config, "quantization_config": _AWQ} if awq else config
    (folder / "config.json").write_text(json.dumps(written, indent=2))
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in [part for name, shape in shapes(config) for part in _stored(name, shape, awq=awq)]:
        if size + _size(tensor) > shard_bytes and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += _size(tensor)
    rng, weight_map = np.random.default_rng(0), {}
    for index, tensors in enumerate(shards, 1):
        file = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        header, offset = {"__metadata__": {"format": "pt"}}, 0
        for name, dtype, shape in tensors:
            end = offset + _size((name, dtype, shape))
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
            offset = end
            weight_map[name] = file
        text = json.dumps(header).encode()
        # As safetensors pads it.
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for tensor in tensors:
                for values in _values(rng, *tensor):
                    out.write(values.tobytes())
    total = sum(_size(tensor) for tensors in shards for tensor in tensors)
    listing = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(listing))


def _values(rng: np.random.Generator, name: str, dtype: str, shape: list[int]) -> Iterator[np.ndarray]:
    """Elements in pieces: norms of one, biases of zero, and matrices that keep the size of what they multiply.

    These are drawn from 65,536 normal values, which is several times faster than drawing each anew. Four bits are
    drawn evenly, and zero points are 7 or 8.
    """
    if dtype != "BF16":
        yield _awq_values(rng, name.rpartition(".")[2], shape)
        return
    if len(shape) == 1:
        yield np.full(shape, 0 if name.endswith("bias") else 1, ml_dtypes.bfloat16)
        return
    values = rng.standard_normal(1 << 16, dtype=np.float32) * np.float32(0.7 * prod(shape[1:]) ** -0.5)
    table = values.astype(ml_dtypes.bfloat16)
    for start in range(0, prod(shape), _PIECE):
        yield table[rng.integers(0, 1 << 16, min(_PIECE, prod(shape) - start), dtype=np.uint16)]


def _awq_values(rng: np.random.Generator, part: str, shape: list[int]) -> np.ndarray:
    """A whole part; the standard deviation of sixteen even numbers is the root of 255/12."""
    if part == "scales":
        return np.full(shape, 0.7 * (shape[0] * _GROUP * 255 / 12) ** -0.5, np.float16)
    words = rng.integers(0, 1 << 32, shape, dtype=np.uint32)
    return words if part == "qweight" else np.uint32(0x77777777) + (words & np.uint32(0x11111111))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=CONFIGS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokenizer", type=Path, help="Folder with the true tokenizer's files.")
    parser.add_argument("--awq", action="store_true", help="The decoder's layers in four bits, as AutoAWQ stores them.")
    arguments = parser.parse_args()
    write(CONFIGS[arguments.model], arguments.out, awq=arguments.awq)
    if arguments.tokenizer is not None:
        from published import dress

        dress(arguments.out, CONFIGS[arguments.model]["model_type"], arguments.tokenizer)
