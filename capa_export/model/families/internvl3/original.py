"""InternVL3 and InternVL3.5 as their authors publish them, read as transformers' own layout of the same model.

transformers' conversion of these checkpoints is followed: names, settings, chat template and picture tiles are those of
the published `-hf` checkpoints.
"""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from capa_export.base.dims import Section
from capa_export.base.errors import CapaError, refusing
from capa_export.model.checkpoint import Checkpoint, StoredTensor, read_json
from capa_export.model.quantized.expanded import ExpandedTensor
from capa_export.model.sidecars import scratch_folder, write_json

__all__ = ["ORIGINAL", "PREPROCESSOR", "preprocessor_config", "translated", "translated_config"]

ORIGINAL = "internvl_chat"
"""The `model_type` of the authors' layout."""
PREPROCESSOR = "preprocessor_config.json"
"""File of the image processor's settings, in either layout."""

_DEFAULTS: Mapping[str, Any] = {
    "select_layer": -1,
    "downsample_ratio": 0.5,
    "template": None,
    "dynamic_image_size": False,
    "use_thumbnail": False,
    "pad2square": False,
    "ps_version": "v1",
    "min_dynamic_patch": 1,
    "max_dynamic_patch": 6,
}
"""Defaults of the authors' config class for absent keys; `_VISION_DEFAULTS` too."""
_SUPPORTED: Mapping[str, Any] = {
    "select_layer": -1,
    "template": "internvl2_5",
    "dynamic_image_size": True,
    "use_thumbnail": True,
    "pad2square": False,
    "ps_version": "v2",
}
_VISION_DEFAULTS: Mapping[str, Any] = {
    "hidden_size": 3200,
    "intermediate_size": 12800,
    "num_hidden_layers": 48,
    "num_attention_heads": 25,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "gelu",
    "norm_type": "rms_norm",
    "layer_norm_eps": 1e-6,
    "qkv_bias": False,
    "qk_normalization": True,
}
_VISION_RENAMED = {"qkv_bias": "attention_bias", "qk_normalization": "use_qk_norm"}
_IMAGE_TOKEN, _END_OF_TURN = "<IMG_CONTEXT>", "<|im_end|>"
_IMAGE_TOKEN_IDS = {"qwen2": 151667, "qwen3": 151671}
"""Ids in the published vocabularies, by decoder; no published config names them."""
_BLOCK = r"^vision_model\.encoder\.layers\.(\d+)\."
_NAMES = [
    (r"^vision_model\.embeddings\.class_embedding$", "vision_tower.embeddings.cls_token"),
    (r"^vision_model\.embeddings\.position_embedding$", "vision_tower.embeddings.position_embeddings"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "vision_tower.embeddings.patch_embeddings.projection."),
    (_BLOCK + r"attn\.proj\.", r"vision_tower.encoder.layer.\1.attention.projection_layer."),
    (_BLOCK + r"attn\.", r"vision_tower.encoder.layer.\1.attention."),
    (_BLOCK + r"norm1\.", r"vision_tower.encoder.layer.\1.layernorm_before."),
    (_BLOCK + r"norm2\.", r"vision_tower.encoder.layer.\1.layernorm_after."),
    (_BLOCK + r"ls([12])$", r"vision_tower.encoder.layer.\1.lambda_\2"),
    (_BLOCK, r"vision_tower.encoder.layer.\1."),
    (r"^mlp1\.0\.", "multi_modal_projector.layer_norm."),
    (r"^mlp1\.1\.", "multi_modal_projector.linear_1."),
    (r"^mlp1\.3\.", "multi_modal_projector.linear_2."),
]
_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "merges.txt", "vocab.json", "*.model")
_PICTURE_SETTINGS = (
    "do_convert_rgb",
    "do_normalize",
    "do_rescale",
    "do_resize",
    "image_mean",
    "image_std",
    "resample",
    "rescale_factor",
)
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}"
    f"{{% if content['type'] == 'image' %}}{{{{ '{_IMAGE_TOKEN}\n' }}}}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def translated_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The config of transformers for an `internvl_chat` config; token ids are those of the published vocabularies.

    Args:
        config: `config.json`, as its authors publish it.
        where: its name in error messages.

    Raises:
        CapaError: a key is missing or malformed, or asks for what transformers' InternVL does not do.
    """
    root = Section({**_DEFAULTS, **config}, where, "")
    text, given = root.section("llm_config"), root.section("vision_config")
    for key, value in _SUPPORTED.items():
        root.expect(key, value)
    vision = Section({**_VISION_DEFAULTS, **given.data}, where, given.name)
    size, patch = vision.count("image_size"), vision.count("patch_size")
    if config.get("force_image_size") not in (None, size):
        raise root.refused(
            "force_image_size",
            f"is {config['force_image_size']!r:.80}, but the vision tower has positions for {size} pixels alone",
        )
    root.count("max_dynamic_patch", least=root.count("min_dynamic_patch"))
    decoder = text.data.get("model_type") or _decoder(text)
    ratio = root.number("downsample_ratio", 0.5)
    return {
        **{key: config[key] for key in ("torch_dtype", "dtype") if key in config},
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "downsample_ratio": ratio,
        "image_seq_length": round((size // patch * ratio) ** 2),
        "image_token_id": _IMAGE_TOKEN_IDS.get(str(decoder), 0),
        "text_config": {**text.data, "model_type": decoder},
        "tie_word_embeddings": bool(text.data.get("tie_word_embeddings")),
        "vision_config": {_VISION_RENAMED.get(key, key): vision.data[key] for key in _VISION_DEFAULTS},
    }


def _decoder(text: Section) -> str:
    """The decoder's `model_type`, by the class that the authors' code goes by."""
    names = text.data.get("architectures")
    if not isinstance(names, list) or not names:
        raise text.refused("model_type", "is missing; use the config.json that was published with the weights")
    return str(names[0]).removesuffix("ForCausalLM").lower()


def translated(checkpoint: Checkpoint) -> Checkpoint:
    """Translate a checkpoint to transformers' layout; weights stay where they are, the rest goes to a scratch folder.

    Raises:
        CapaError: a file is missing or malformed, or the tokenizer lacks a token that prompts need.
    """
    config = translated_config(checkpoint.config, str(checkpoint.folder / "config.json"))
    folder = scratch_folder()
    for pattern in _TOKENIZER_FILES:
        for path in checkpoint.folder.glob(pattern):
            shutil.copyfile(path, folder / path.name)
    # Its template is for text alone, or writes pictures as the authors' own code takes them.
    tokenizer_config = _optional(checkpoint.folder / "tokenizer_config.json")
    write_json(folder / "tokenizer_config.json", {**tokenizer_config, "chat_template": _CHAT_TEMPLATE})
    (folder / "chat_template.jinja").write_text(_CHAT_TEMPLATE, encoding="utf-8")
    given = read_json(checkpoint.folder / PREPROCESSOR)
    write_json(folder / PREPROCESSOR, preprocessor_config(checkpoint.config, given))
    write_json(folder / "config.json", config)
    ids = _token_ids(folder, checkpoint.folder)
    config["image_token_id"] = ids[_IMAGE_TOKEN]
    config["text_config"]["eos_token_id"] = ids[_END_OF_TURN]
    write_json(folder / "config.json", config)
    # The authors' chat ends at the end of a turn, whatever their files say.
    generation = _optional(checkpoint.folder / "generation_config.json")
    write_json(folder / "generation_config.json", {**generation, "eos_token_id": ids[_END_OF_TURN]})
    return replace(checkpoint, config=config, tensors=_tensors(checkpoint), translation=folder)


def preprocessor_config(config: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the image processor that cuts pictures into tiles as the authors' example code does.

    Args:
        config: `config.json`, as its authors publish it.
        given: the settings that they publish.
    """
    config = {**_DEFAULTS, **config}
    size = {**_VISION_DEFAULTS, **config["vision_config"]}["image_size"]
    return {
        "image_processor_type": "GotOcr2ImageProcessor",
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        **{key: given[key] for key in _PICTURE_SETTINGS if key in given},
        "size": {"height": size, "width": size},
        "crop_to_patches": True,
        "min_patches": config["min_dynamic_patch"],
        "max_patches": config["max_dynamic_patch"],
    }


def _token_ids(folder: Path, published: Path) -> dict[str, int]:
    """The ids of the tokens that prompts need, by the tokenizer in `folder`."""
    from transformers import AutoTokenizer

    with refusing(f"{published}: the tokenizer does not load"):
        vocabulary = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False).get_vocab()
    for token in (_IMAGE_TOKEN, _END_OF_TURN, "<img>", "</img>"):
        if token not in vocabulary:
            raise CapaError(
                f"{published}: the tokenizer has no token {token}, which InternVL's prompts need; "
                "use the tokenizer files that were published with the weights"
            )
    return vocabulary


def _tensors(checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    """The tensors by transformers' names; of a fused projection, query, key and value lie one after the other."""
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in checkpoint.renamed(_NAMES).items():
        if ".attention.qkv." not in name:
            tensors[name] = tensor
            continue
        if isinstance(tensor, ExpandedTensor):
            raise CapaError(
                f"{tensor.path}: {tensor.name} is quantized; of InternVL in its authors' layout only the decoder may be"
            )
        rows, *rest = tensor.shape
        if rows % 3:
            raise CapaError(f"{tensor.path}: tensor {tensor.name} has {rows} rows, which are not three projections")
        for index, part in enumerate(("q_proj", "k_proj", "v_proj")):
            tensors[name.replace(".qkv.", f".{part}.")] = replace(
                tensor,
                shape=(rows // 3, *rest),
                offset=tensor.offset + index * (tensor.nbytes // 3),
                nbytes=tensor.nbytes // 3,
            )
    return tensors


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
