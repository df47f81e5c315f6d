"""An InternVL3 or InternVL3.5 of five decoder layers, in the layout of transformers and in that of its authors."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from transformers import InternVLConfig, InternVLForConditionalGeneration, PreTrainedTokenizerFast
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from tests.models.making import randomized, saved

__all__ = [
    "CHAT_TEMPLATE",
    "QWEN3",
    "SIDE",
    "build_image_processor",
    "build_tokenizer",
    "original_config",
    "random_model",
    "save_model",
    "save_original",
    "small_config",
]

SIDE = 56
"""Of a tile: 4 x 4 patches, 2 x 2 visual tokens."""

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
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
    return GotOcr2ImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, crop_to_patches=False, image_mean=_MEAN, image_std=_STD
    )


QWEN3 = {"model_type": "qwen3", "head_dim": 24, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}
"""What makes the decoder that of an InternVL3.5: heads do not make up the hidden size."""


def small_config(
    *, vision: Mapping[str, Any] | None = None, text: Mapping[str, Any] | None = None, tie: bool = False
) -> InternVLConfig:
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
            **(text or {}),
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


_PARTS = [
    ("vision_tower", "vision_model"),
    ("encoder.layer.", "encoder.layers."),
    ("cls_token", "class_embedding"),
    ("position_embeddings", "position_embedding"),
    ("patch_embeddings.projection", "patch_embedding"),
    ("lambda_", "ls"),
    ("attention.projection_layer", "attn.proj"),
    ("attention.", "attn."),
    ("layernorm_before", "norm1"),
    ("layernorm_after", "norm2"),
    ("multi_modal_projector.layer_norm", "mlp1.0"),
    ("multi_modal_projector.linear_1", "mlp1.1"),
    ("multi_modal_projector.linear_2", "mlp1.3"),
]
"""transformers' names and the authors', as its script for the `-hf` checkpoints converted them; in this order."""


def original_config(config: InternVLConfig, **changes: Any) -> dict[str, Any]:
    """The keys that OpenGVLab/InternVL3-1B is published with, with the numbers of this config."""
    text, vision = config.text_config, config.vision_config
    rope = text.rope_parameters
    return {
        "architectures": ["InternVLChatModel"],
        "auto_map": {
            "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
            "AutoModel": "modeling_internvl_chat.InternVLChatModel",
            "AutoModelForCausalLM": "modeling_internvl_chat.InternVLChatModel",
        },
        "downsample_ratio": config.downsample_ratio,
        "dynamic_image_size": True,
        "force_image_size": vision.image_size[0],
        "hidden_size": text.hidden_size,
        "image_fold": None,
        "llm_config": {
            "_name_or_path": "./pretrained/Qwen2.5-32B-Instruct",
            "architectures": [{"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}[text.model_type]],
            "_attn_implementation_autoset": True,
            "attention_dropout": 0.0,
            "bos_token_id": 1,
            "eos_token_id": 1,
            **({"head_dim": text.head_dim} if text.model_type == "qwen3" else {}),
            "hidden_act": "silu",
            "hidden_size": text.hidden_size,
            "initializer_range": 0.02,
            "intermediate_size": text.intermediate_size,
            "max_position_embeddings": text.max_position_embeddings,
            "max_window_layers": 70,
            "model_type": text.model_type,
            "moe_config": None,
            "num_attention_heads": text.num_attention_heads,
            "num_hidden_layers": text.num_hidden_layers,
            "num_key_value_heads": text.num_key_value_heads,
            "rms_norm_eps": text.rms_norm_eps,
            "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"}
            if rope["rope_type"] == "dynamic"
            else None,
            "rope_theta": rope["rope_theta"],
            "sliding_window": None,
            "tie_word_embeddings": config.tie_word_embeddings,
            "torch_dtype": "bfloat16",
            "use_bfloat16": True,
            "use_cache": False,
            "use_sliding_window": False,
            "vocab_size": text.vocab_size,
        },
        "max_dynamic_patch": 12,
        "min_dynamic_patch": 1,
        "model_type": "internvl_chat",
        "output_attentions": False,
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": -1,
        "system_message": None,
        "template": "internvl2_5",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": None,
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "use_thumbnail": True,
        "vision_config": {
            "_name_or_path": "OpenGVLab/InternViT-6B-448px-V1-5",
            "architectures": ["InternVisionModel"],
            "attention_dropout": 0.0,
            "auto_map": {"AutoConfig": "configuration_intern_vit.InternVisionConfig"},
            "capacity_factor": 1.2,
            "drop_path_rate": 0.1,
            "dropout": 0.0,
            "hidden_act": "gelu",
            "hidden_size": vision.hidden_size,
            "image_size": vision.image_size[0],
            "initializer_factor": 0.1,
            "intermediate_size": vision.intermediate_size,
            "layer_norm_eps": vision.layer_norm_eps,
            "model_type": "intern_vit_6b",
            "norm_type": vision.norm_type,
            "num_attention_heads": vision.num_attention_heads,
            "num_channels": 3,
            "num_experts": 8,
            "num_hidden_layers": vision.num_hidden_layers,
            "patch_size": vision.patch_size[0],
            "qk_normalization": vision.use_qk_norm,
            "qkv_bias": vision.attention_bias,
            "torch_dtype": "bfloat16",
            "use_bfloat16": True,
            "use_flash_attn": False,
            "use_moe": False,
        },
        **changes,
    }


def save_original(folder: Path, model: InternVLForConditionalGeneration, **changes: Any) -> Path:
    """The model as OpenGVLab publishes InternVL3: names, settings and files; `changes` are of its config."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        given = name
        if given == "lm_head.weight":
            if model.config.tie_word_embeddings:
                continue
            given = "language_model.lm_head.weight"
        given = re.sub(r"^model\.language_model\.", "language_model.model.", given).removeprefix("model.")
        for theirs, ours in _PARTS if not given.startswith("language_model.") else ():
            given = given.replace(theirs, ours)
        tensors[given] = tensor.contiguous()
    for query in [name for name in tensors if name.startswith("vision_model.") and ".q_proj." in name]:
        parts = [tensors.pop(query.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
        tensors[query.replace(".q_proj.", ".qkv.")] = torch.cat(parts)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(original_config(model.config, **changes)))
    (folder / "generation_config.json").write_text(json.dumps({"_from_model_config": True, "eos_token_id": [1]}))
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "crop_size": SIDE,
                "do_center_crop": True,
                "do_normalize": True,
                "do_resize": True,
                "feature_extractor_type": "CLIPFeatureExtractor",
                "image_mean": list(_MEAN),
                "image_std": list(_STD),
                "resample": 3,
                "size": SIDE,
            }
        )
    )
    tokenizer = build_tokenizer()
    # As published: for text alone.
    tokenizer.chat_template = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}{% endfor %}"
    )
    tokenizer.save_pretrained(folder)
    return folder
