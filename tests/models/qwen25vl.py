"""A Qwen2.5-VL of five decoder layers."""

from pathlib import Path
from typing import Any

from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from benchmarks.tiny.tiny_qwen25vl import build_image_processor, build_tokenizer
from tests.models.making import randomized, saved

__all__ = ["random_model", "save_model"]


def random_model(seed: int = 0, **text: Any) -> Qwen2_5_VLForConditionalGeneration:
    """Five decoder layers, GQA 4/2, biases; three vision blocks of which the last sees the whole picture."""
    tokenizer = build_tokenizer()
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 3, 3]},
            **text,
        },
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [2],
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )
    return randomized(Qwen2_5_VLForConditionalGeneration, config, seed)


def save_model(folder: Path, model: Qwen2_5_VLForConditionalGeneration, **options: Any) -> Path:
    """A whole checkpoint folder, tokenizer and image processor included."""
    return saved(folder, model, build_tokenizer(), build_image_processor(), **options)
