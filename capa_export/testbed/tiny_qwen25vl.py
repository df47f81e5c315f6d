"""A tiny Qwen2.5-VL with its tokenizer and image processor, built without any download."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from capa_export.testbed.scenes import CELL, COLORS, SHAPES

__all__ = ["build_image_processor", "build_model", "build_tokenizer", "prompt_text", "save_checkpoint"]

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
WORDS = (
    *("\n", "system", "user", "assistant", "?", ".", ",", "!"),
    *("what", "color", "shape", "is", "the", "there", "a", "an", "has", "same", "as", "yes", "no"),
    # "purple" and "triangle" are known but never drawn: a model trained with them took purple for
    # pink and the triangle for the star when both were in a picture.
    *(*tuple(COLORS)[:5], "purple", *tuple(COLORS)[5:]),
    *(*SHAPES[:3], "triangle", *SHAPES[3:]),
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

_LAYERS = 12
_VISION_DEPTH = 4


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer: lower case, punctuation apart, `colour` read as `color`."""
    vocab = {token: i for i, token in enumerate((*SPECIAL_TOKENS, *WORDS))}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace("colour", "color")])
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("\n"), "isolated"),
            pre_tokenizers.Split(Regex("[ \t\r]+"), "removed"),
            pre_tokenizers.Punctuation("isolated"),
        ]
    )
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=32768,
        padding_side="left",
    )


def build_image_processor() -> Qwen2VLImageProcessorPil:
    """Qwen's image processor: sides rounded to whole cells, from 2 x 2 to 128 x 128 of them."""
    return Qwen2VLImageProcessorPil(size={"shortest_edge": 4 * CELL**2, "longest_edge": 16384 * CELL**2})


def prompt_text(question: str, num_image_tokens: int) -> str:
    """The prompt that the chat template gives for one picture and a question, image tokens expanded."""
    pads = "<|image_pad|>" * num_image_tokens
    vision = f"<|vision_start|>{pads}<|vision_end|>"
    return f"<|im_start|>user\n{vision}{question}<|im_end|>\n<|im_start|>assistant\n"


def build_model(tokenizer: PreTrainedTokenizerFast, *, seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """A freshly initialised model of about 6 million parameters."""
    ids = tokenizer.get_vocab()
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": _LAYERS,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
            "initializer_range": 0.06,
            # Chunked mrope leaves the lowest frequencies to the width axis: with Qwen's theta
            # of 1e6 the columns of a small picture would be indistinguishable.
            "rope_parameters": {"rope_type": "default", "rope_theta": 50.0, "mrope_section": [4, 6, 6]},
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": _VISION_DEPTH,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_heads": 4,
            "out_hidden_size": 192,
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
    with torch.no_grad():
        # Without this scaling twelve layers stay at chance for the whole run.
        layers: Any = model.model.language_model.layers
        for layer in layers:
            layer.self_attn.o_proj.weight.mul_((2 * _LAYERS) ** -0.5)
            layer.mlp.down_proj.weight.mul_((2 * _LAYERS) ** -0.5)
        blocks: Any = model.model.visual.blocks
        for block in blocks:
            block.attn.proj.weight.mul_((2 * _VISION_DEPTH) ** -0.5)
            block.mlp.down_proj.weight.mul_((2 * _VISION_DEPTH) ** -0.5)
    model.generation_config = GenerationConfig(
        eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"], do_sample=False
    )
    return model


def save_checkpoint(
    folder: Path, model: Qwen2_5_VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Writes a folder that the Auto classes load: weights in fp16, tokenizer, image processor."""
    half = Qwen2_5_VLForConditionalGeneration(model.config)
    half.load_state_dict(model.state_dict())
    half.generation_config = model.generation_config
    half.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    build_image_processor().save_pretrained(folder)
