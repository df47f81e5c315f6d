"""An InternVL3 of five decoder layers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from transformers import InternVLConfig, InternVLForConditionalGeneration, PreTrainedTokenizerFast
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from tests.models.making import randomized, saved

__all__ = [
    "CHAT_TEMPLATE",
    "SIDE",
    "build_image_processor",
    "build_tokenizer",
    "random_model",
    "save_model",
    "small_config",
]

SIDE = 56
"""Of a tile: 4 x 4 patches, 2 x 2 visual tokens."""

SPECIAL = ("<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>")
WORDS = ("\n", "user", "assistant", "what", "color", "shape", "is", "the", "star", "red", "?", "Describe", "this")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
    "{% elif content['type'] == 'video' %}{{ '<video>\n' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level, with the names that the checkpoints give their picture tokens."""
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate((*SPECIAL, *WORDS))}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("\n"), "isolated"), pre_tokenizers.Split(Regex(" +"), "removed")]
    )
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        extra_special_tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    )


def build_image_processor() -> GotOcr2ImageProcessorPil:
    """As published: `crop_to_patches` is off in the file."""
    return GotOcr2ImageProcessorPil(size={"height": SIDE, "width": SIDE}, crop_to_patches=False)


def small_config(*, vision: Mapping[str, Any] | None = None, tie: bool = False) -> InternVLConfig:
    """Five decoder layers with InternVL3's dynamic RoPE, two vision blocks; GQA 4/2, biases."""
    tokenizer = build_tokenizer()
    return InternVLConfig(
        text_config={
            "model_type": "qwen2",
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0},
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "attention_bias": True,
            "image_size": [SIDE, SIDE],
            **(vision or {}),
        },
        image_token_id=tokenizer.get_vocab()["<IMG_CONTEXT>"],
        image_seq_length=4,
        tie_word_embeddings=tie,
    )


def random_model(**options: Any) -> InternVLForConditionalGeneration:
    """Nothing is zero or one, which would hide a mistake in it."""
    return randomized(InternVLForConditionalGeneration, small_config(**options), 0)


def save_model(folder: Path, model: InternVLForConditionalGeneration, **options: Any) -> Path:
    """A whole checkpoint folder, tokenizer and image processor included."""
    return saved(folder, model, build_tokenizer(), build_image_processor(), **options)
