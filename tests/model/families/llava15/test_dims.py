"""LLaVA-1.5's dimensions, read from the configs of transformers 4 and 5, and what follows from them."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from capa_export.base.errors import CapaError
from capa_export.model.families.llava15.dims import VisionDims, model_dims
from capa_export.plan.flops import parameters

PUBLISHED_VISION = {
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "model_type": "clip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
    "vocab_size": 32000,
}
PUBLISHED_TEXT = {
    "7B": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5",
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32064,
    },
    "13B": {
        "_name_or_path": "lmsys/vicuna-13b-v1.5",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "num_attention_heads": 40,
        "num_hidden_layers": 40,
        "num_key_value_heads": 40,
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32064,
    },
}


def published(size: str = "7B", **changes: Any) -> dict[str, Any]:
    """The config of transformers 4 that came with the weights."""
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_token_index": 32000,
        "model_type": "llava",
        "pad_token_id": 32001,
        "projector_hidden_act": "gelu",
        "text_config": dict(PUBLISHED_TEXT[size]),
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "vision_config": dict(PUBLISHED_VISION),
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vocab_size": 32064,
        **changes,
    }


@pytest.mark.parametrize("size", PUBLISHED_TEXT)
def test_both_layouts_give_the_dimensions_of_transformers(size: str) -> None:
    old = published(size)
    config = LlavaConfig(**json.loads(json.dumps(old)))
    dims = model_dims(old)
    assert model_dims(json.loads(config.to_json_string(use_diff=False))) == dims
    assert model_dims(json.loads(config.to_json_string())) == dims
    text = config.text_config
    assert dims.decoder.hidden_size == text.hidden_size
    assert dims.decoder.num_layers == text.num_hidden_layers
    assert dims.decoder.num_kv_heads == text.num_key_value_heads == dims.decoder.num_heads
    assert (dims.decoder.head_dim, dims.decoder.rope_theta, dims.decoder.rms_norm_eps) == (128, 10_000.0, 1e-5)
    assert (dims.decoder.position_axes, dims.decoder.attention_bias) == (1, False)
    assert (dims.image_token_id, dims.vision.num_tokens, dims.vision.num_run_layers) == (32000, 576, 23)
    with torch.device("meta"):
        real = LlavaForConditionalGeneration(config)
    assert parameters(dims).total == real.num_parameters()


def test_absent_keys_have_the_defaults_of_transformers() -> None:
    bare = {"model_type": "llava", "text_config": {"model_type": "llama"}, "vision_config": {}}
    config = LlavaConfig(text_config={"model_type": "llama"}, vision_config={"model_type": "clip_vision_model"})
    assert model_dims(bare) == model_dims(json.loads(config.to_json_string(use_diff=False)))


def test_the_other_name_of_the_image_token_is_read() -> None:
    config = published()
    config["image_token_id"] = config.pop("image_token_index") - 5
    assert model_dims(config).image_token_id == 31995


def vision(**changes: Any) -> dict[str, Any]:
    return {"vision_config": PUBLISHED_VISION | changes}


def text(**changes: Any) -> dict[str, Any]:
    return {"text_config": PUBLISHED_TEXT["7B"] | changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llava_next"}, "model_type is 'llava_next', this recipe is for 'llava'"),
        ({"vision_feature_layer": [-2, -5]}, r"vision_feature_layer: is \[-2, -5\], only the number of a single layer"),
        ({"vision_feature_layer": -25}, "vision_feature_layer: -25 is none of the 24 layers"),
        ({"vision_feature_layer": 0}, "vision_feature_layer: 0 is none of the 24 layers"),
        ({"vision_feature_select_strategy": "cls"}, "vision_feature_select_strategy: is 'cls'"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act: is 'relu', only 'gelu'"),
        (text(model_type="mistral"), "text_config.model_type: is 'mistral', only 'llama'"),
        (text(attention_bias=True), "text_config.attention_bias: is True, only False"),
        (text(rope_scaling={"type": "linear", "factor": 2.0}), "rope_scaling.rope_type: is 'linear', only 'default'"),
        (vision(model_type="siglip_vision_model"), "vision_config.model_type: is 'siglip_vision_model'"),
        (vision(hidden_act="gelu"), "vision_config.hidden_act: is 'gelu', only 'quick_gelu'"),
        (vision(image_size=340), "vision_config.image_size: 340 must be a multiple of patches of 14"),
        (vision(num_attention_heads=15), "vision_config.hidden_size: 1024 must be a multiple of 15 heads"),
    ],
)
def test_what_the_graphs_do_not_do_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CapaError, match=message):
        model_dims(published(**changes))


def test_vision_flops_count_the_layers_that_run() -> None:
    tower: VisionDims = model_dims(published()).vision
    once = tower.flops(576)
    assert tower.flops(577) == tower.flops(1152) == 2 * once
    assert once - replace(tower, num_run_layers=22).flops(576) == 577 * 2 * 12 * 1024**2 + 4 * 577**2 * 1024
