"""A tiny InternVL3 with its tokenizer and image processor, built without any download."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import InternVLConfig, InternVLForConditionalGeneration, PreTrainedTokenizerFast
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from benchmarks.tiny.beds import CELLS, normalized
from benchmarks.tiny.decoder import damp, generation_config, text_config
from benchmarks.tiny.tokenizer import word_tokenizer
from benchmarks.tiny.tower import start_tower
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

FAMILY = "internvl3"
STANDS_FOR = {
    "<img>": "<|vision_start|>",
    "</img>": "<|vision_end|>",
    "<IMG_CONTEXT>": "<|image_pad|>",
    "<video>": "<|video_pad|>",
}
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<video>",
    "<unk>",
)

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

_SIDE = CELLS * CELL


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The shared words, with InternVL's special tokens and chat template."""
    return word_tokenizer(
        SPECIAL_TOKENS,
        eos="<|im_end|>",
        pad="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        roles={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    )


def build_image_processor() -> GotOcr2ImageProcessorPil:
    """Tiles of 224 x 224; `crop_to_patches` is off in the file, as it is in the published ones."""
    return GotOcr2ImageProcessorPil(size={"height": _SIDE, "width": _SIDE}, crop_to_patches=False)


def build_model(tokenizer: PreTrainedTokenizerFast, *, seed: int = 0) -> InternVLForConditionalGeneration:
    """A freshly initialised model of about 6 million parameters."""
    config = InternVLConfig(
        text_config={
            **text_config(tokenizer),
            "model_type": "qwen2",
            "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 500.0},
        },
        vision_config={
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "attention_bias": True,
            "layer_scale_init_value": 1.0,
            "image_size": [_SIDE, _SIDE],
            "patch_size": [14, 14],
        },
        image_token_id=tokenizer.get_vocab()["<IMG_CONTEXT>"],
        image_seq_length=CELLS**2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = InternVLForConditionalGeneration(config)
    model.set_attn_implementation("eager")
    layers: Any = model.model.language_model.layers
    damp(p for layer in layers for p in (layer.self_attn.o_proj, layer.mlp.down_proj))
    tower: Any = model.model.vision_tower
    start_tower(tower, model.model.multi_modal_projector, tower.embeddings.position_embeddings[0])
    damp(p for block in tower.encoder.layer for p in (block.attention.projection_layer, block.mlp.fc2))
    model.generation_config = generation_config(tokenizer)
    return model


def pixels_from_pictures(pictures_BHWC: NDArray[np.uint8]) -> Tensor:
    """One tile a picture: [B, 3, 224, 224]."""
    return torch.from_numpy(normalized(pictures_BHWC, build_image_processor())).permute(0, 3, 1, 2)


def visual_tokens(model: InternVLForConditionalGeneration, pixels: Tensor) -> Tensor:
    """The vision tower and projector: [B, 64, H]."""
    seen: Any = model.model.get_image_features(pixels)
    return seen.pooler_output
