"""A Qwen3-VL of five decoder layers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from benchmarks.tiny.tiny_qwen25vl import build_tokenizer
from tests.models.making import randomized, saved

__all__ = ["build_image_processor", "random_model", "save_model"]


def random_model(seed: int = 0, *, vision: Mapping[str, Any] | None = None, **options: Any) -> Any:
    """Five decoder layers, GQA 4/2, heads that do not make up the hidden size; three blocks go to DeepStack."""
    tokenizer = build_tokenizer()
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 24,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 100.0,
                "mrope_section": [6, 3, 3],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": 4,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 64,
            "num_position_embeddings": 49,
            "deepstack_visual_indexes": [0, 1, 3],
            **(vision or {}),
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        **options,
    )
    return randomized(Qwen3VLForConditionalGeneration, config, seed)


def build_image_processor() -> Qwen2VLImageProcessorPil:
    """Sides rounded to whole visual tokens of 32 pixels."""
    return Qwen2VLImageProcessorPil(
        patch_size=16,
        size={"shortest_edge": 32**2, "longest_edge": 16384 * 32**2},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )


def save_model(folder: Path, model: Any, **options: Any) -> Path:
    """A whole checkpoint folder, tokenizer and image processor included."""
    return saved(folder, model, build_tokenizer(), build_image_processor(), **options)
