"""A tiny Qwen2.5-VL with its tokenizer and image processor, built without any download."""

# Shapes: B pictures, N patches, P values of a patch, H decoder width.

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from benchmarks.tiny.beds import CELLS, NUM_VISUAL, normalized
from benchmarks.tiny.decoder import HIDDEN, damp, generation_config, rms_norm, rotate, text_config
from benchmarks.tiny.tokenizer import word_tokenizer
from capa_export.data.drawing import CELL

__all__ = [
    "FAMILY",
    "STANDS_FOR",
    "build_image_processor",
    "build_model",
    "build_tokenizer",
    "pixels_from_pictures",
    "visual_tokens",
]

FAMILY = "qwen25vl"
STANDS_FOR: dict[str, str] = {}
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<unk>",
)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_VISION_DEPTH = 4


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The shared words, with Qwen's special tokens and chat template."""
    return word_tokenizer(SPECIAL_TOKENS, eos="<|im_end|>", pad="<|endoftext|>", chat_template=CHAT_TEMPLATE)


def build_image_processor() -> Qwen2VLImageProcessorPil:
    """Qwen's image processor: sides rounded to whole cells, from 2 x 2 to 128 x 128 of them."""
    return Qwen2VLImageProcessorPil(size={"shortest_edge": 4 * CELL**2, "longest_edge": 16384 * CELL**2})


def build_model(tokenizer: PreTrainedTokenizerFast, *, seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """A freshly initialised model of about 6 million parameters."""
    ids = tokenizer.get_vocab()
    config = Qwen2_5_VLConfig(
        text_config={
            **text_config(tokenizer),
            # Chunked mrope leaves the lowest frequencies to the width axis: with Qwen's theta
            # of 1e6 the columns of a small picture would be indistinguishable.
            "rope_parameters": {"rope_type": "default", "rope_theta": 50.0, "mrope_section": [4, 6, 6]},
        },
        vision_config={
            "depth": _VISION_DEPTH,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_heads": 4,
            "out_hidden_size": HIDDEN,
            "patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [_VISION_DEPTH - 1],
            "initializer_range": 0.06,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    layers: Any = model.model.language_model.layers
    damp(p for layer in layers for p in (layer.self_attn.o_proj, layer.mlp.down_proj))
    blocks: Any = model.model.visual.blocks
    damp(p for block in blocks for p in (block.attn.proj, block.mlp.down_proj))
    model.generation_config = generation_config(tokenizer)
    return model


def pixels_from_pictures(pictures_BHWC: NDArray[np.uint8]) -> Tensor:
    """Patches [B, 256, 1176], each picture's in the order of the image processor."""
    values = normalized(pictures_BHWC, build_image_processor())
    batch = values.shape[0]
    blocks = values.reshape(batch, CELLS, 2, 14, CELLS, 2, 14, 3).transpose(0, 1, 4, 2, 5, 7, 3, 6)
    frames = np.broadcast_to(blocks[:, :, :, :, :, :, None], (*blocks.shape[:6], 2, 14, 14))
    return torch.from_numpy(np.ascontiguousarray(frames).reshape(batch, NUM_VISUAL * 4, -1))


def visual_tokens(model: Qwen2_5_VLForConditionalGeneration, pixels: Tensor) -> Tensor:
    """The vision tower on a batch of patches: [B, 64, H], with the windows as a batch dimension."""
    tower: Any = model.model.visual
    batch, side, window = pixels.shape[0], 2, CELLS // 2
    patch = torch.arange(NUM_VISUAL * 4)
    row = patch // (4 * CELLS) * 2 + patch // 2 % 2
    col = patch // 4 % CELLS * 2 + patch % 2
    angles = tower.rotary_pos_emb(pixels, torch.stack([row, col], dim=-1))

    def by_window(x: Tensor) -> Tensor:
        x = x.reshape(-1, side, window, side, window, 4, x.shape[-1])
        return x.permute(0, 1, 3, 2, 4, 5, 6).reshape(-1, side * side, 4 * window * window, x.shape[-1])

    x = by_window(F.linear(pixels, tower.patch_embed.proj.weight.flatten(1)).float())
    cos, sin = (by_window(a) for a in angles)
    for index, block in enumerate(tower.blocks):
        if index in tower.fullatt_block_indexes:
            x, cos, sin = (a.reshape(a.shape[0], 1, -1, a.shape[-1]) for a in (x, cos, sin))
        attention = block.attn
        qkv = attention.qkv(rms_norm(block.norm1, x))
        q, k, v = qkv.unflatten(-1, (3, attention.num_heads, -1)).permute(3, 0, 1, 4, 2, 5)
        q, k = (rotate(a, cos[:, :, None].to(a), sin[:, :, None].to(a)) for a in (q, k))
        weights = ((q * attention.scaling) @ k.mT).softmax(dim=-1)
        x = x + attention.proj((weights @ v).transpose(2, 3).flatten(-2))
        x = x + block.mlp(rms_norm(block.norm2, x))
    merged = tower.merger.mlp(rms_norm(tower.merger.ln_q, x).reshape(batch, side, side, window, window, -1))
    return merged.transpose(2, 3).reshape(batch, NUM_VISUAL, -1)
