"""A tiny LLaVA-1.5 with its tokenizer and image processor, built without any download."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

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

FAMILY = "llava15"
STANDS_FOR = {
    "<s>": "<|im_start|>",
    "</s>": "<|im_end|>",
    "<image>": "<|image_pad|>",
    "<pad>": "<|endoftext|>",
    "ss": "<|im_end|>",
    "ist": "<|im_start|>",
    "ant": "assistant",
    ":": "\n",
}
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<image>", "<pad>")

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

_SIDE = CELLS * CELL


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The shared words, with LLaVA's special tokens and chat template; like Llama's it puts `<s>` in front."""
    return word_tokenizer(
        SPECIAL_TOKENS,
        bos="<s>",
        eos="</s>",
        pad="<pad>",
        chat_template=CHAT_TEMPLATE,
        more_words=[":", "ss", "ist", "ant"],
        # As Llama's tokenizer cuts it. In fewer tokens it leaves the decoder too few between a question
        # and its answer: the kind `same` was not learned.
        spelled={"assistant": "a ss ist ant"},
    )


def build_image_processor() -> CLIPImageProcessorPil:
    """CLIP's: the shorter side to 224 pixels, then the middle."""
    return CLIPImageProcessorPil(size={"shortest_edge": _SIDE}, crop_size={"height": _SIDE, "width": _SIDE})


def build_model(tokenizer: PreTrainedTokenizerFast, *, seed: int = 0) -> LlavaForConditionalGeneration:
    """A freshly initialised model of about 7 million parameters."""
    config = LlavaConfig(
        text_config={
            **text_config(tokenizer),
            "model_type": "llama",
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        },
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 192,
            "intermediate_size": 512,
            # The last one does not run.
            "num_hidden_layers": 5,
            "num_attention_heads": 6,
            "image_size": _SIDE,
            "patch_size": CELL,
        },
        image_token_index=tokenizer.get_vocab()["<image>"],
        image_seq_length=CELLS**2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    model.set_attn_implementation("eager")
    layers: Any = model.model.language_model.layers
    damp(p for layer in layers for p in (layer.self_attn.o_proj, layer.mlp.down_proj))
    tower: Any = model.model.vision_tower
    start_tower(tower, model.model.multi_modal_projector, tower.embeddings.position_embedding.weight)
    damp(p for block in tower.encoder.layers for p in (block.self_attn.out_proj, block.mlp.fc2))
    model.generation_config = generation_config(tokenizer)
    return model


def pixels_from_pictures(pictures_BHWC: NDArray[np.uint8]) -> Tensor:
    """Pictures [B, 3, 224, 224]."""
    return torch.from_numpy(normalized(pictures_BHWC, build_image_processor())).permute(0, 3, 1, 2)


def visual_tokens(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """The vision tower and projector: [B, 64, H]."""
    seen: Any = model.model.get_image_features(pixels)
    return torch.stack(list(seen.pooler_output))
