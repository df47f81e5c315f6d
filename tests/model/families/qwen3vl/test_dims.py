"""Qwen3-VL's dimensions, read from the configs of transformers 4 and 5, and what follows from them."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from capa_export.base.errors import CapaError
from capa_export.model.families.qwen3vl.dims import model_dims
from capa_export.plan.flops import flops, parameters

# Hidden size, FFN size, layers, query heads, tied; of the tower: depth, hidden size, FFN size, DeepStack blocks.
SIZES = {
    "2B": (2048, 6144, 28, 16, True, 24, 1024, 4096, [5, 11, 17]),
    "4B": (2560, 9728, 36, 32, True, 24, 1024, 4096, [5, 11, 17]),
    "8B": (4096, 12288, 36, 32, False, 27, 1152, 4304, [8, 16, 24]),
}


def published(size: str = "8B", *, text: Any = None, vision: Any = None, **changes: Any) -> dict[str, Any]:
    """The config of transformers 4.57 that came with the weights, with keys changed."""
    hidden, inner, layers, heads, tied, depth, vision_hidden, vision_inner, blocks = SIZES[size]
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "image_token_id": 151655,
        "model_type": "qwen3_vl",
        "text_config": {
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 151643,
            "dtype": "bfloat16",
            "eos_token_id": 151645,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": hidden,
            "initializer_range": 0.02,
            "intermediate_size": inner,
            "max_position_embeddings": 262144,
            "model_type": "qwen3_vl_text",
            "num_attention_heads": heads,
            "num_hidden_layers": layers,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
            "rope_theta": 5000000,
            "use_cache": True,
            "vocab_size": 151936,
            **(text or {}),
        },
        "tie_word_embeddings": tied,
        "transformers_version": "4.57.0.dev0",
        "video_token_id": 151656,
        "vision_config": {
            "deepstack_visual_indexes": blocks,
            "depth": depth,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": vision_hidden,
            "in_channels": 3,
            "initializer_range": 0.02,
            "intermediate_size": vision_inner,
            "model_type": "qwen3_vl",
            "num_heads": 16,
            "num_position_embeddings": 2304,
            "out_hidden_size": hidden,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            **(vision or {}),
        },
        "vision_end_token_id": 151653,
        "vision_start_token_id": 151652,
        **changes,
    }


@pytest.mark.parametrize("size", SIZES)
def test_both_layouts_give_the_dimensions_of_transformers(size: str) -> None:
    old = published(size)
    config = Qwen3VLConfig(**json.loads(json.dumps(old)))
    dims = model_dims(old)
    assert model_dims(json.loads(config.to_json_string(use_diff=False))) == dims
    assert model_dims(json.loads(config.to_json_string())) == dims
    decoder, text = dims.decoder, config.text_config
    assert (decoder.hidden_size, decoder.num_layers) == (text.hidden_size, text.num_hidden_layers)
    assert (decoder.num_kv_heads, decoder.head_dim) == (8, 128)
    assert decoder.rope_theta == text.rope_parameters["rope_theta"] == 5e6
    assert decoder.tie_word_embeddings is config.tie_word_embeddings
    assert decoder.qk_norm and decoder.mrope_interleaved and decoder.mrope_section == (24, 20, 20)
    assert decoder.deepstack_layers == 3
    with torch.device("meta"):
        real = Qwen3VLForConditionalGeneration(config)
    assert parameters(dims).total == sum(parameter.numel() for parameter in real.parameters())


def test_absent_keys_have_the_defaults_of_transformers() -> None:
    text = {"hidden_size": 3584, "intermediate_size": 100, "num_hidden_layers": 4, "num_attention_heads": 32}
    config = Qwen3VLConfig(text_config=dict(text), vision_config={})
    bare = {"model_type": "qwen3_vl", "text_config": text, "vision_config": {}}
    assert model_dims(bare) == model_dims(json.loads(config.to_json_string(use_diff=False)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2_5_vl"}, "model_type is 'qwen2_5_vl', this recipe is for 'qwen3_vl'"),
        ({"model_type": "qwen3_vl_moe"}, "model_type is 'qwen3_vl_moe', a mixture of experts, .* use a dense Qwen3-VL"),
        ({"text_config": None}, "text_config: is missing"),
        ({"text": {"attention_bias": True}}, "text_config.attention_bias: is True, only False"),
        ({"text": {"rope_scaling": {"rope_type": "yarn"}}}, "rope_type: is 'yarn', only 'default' and 'mrope'"),
        ({"text": {"rope_scaling": {"mrope_section": [24, 20]}}}, "mrope_section: .* three numbers that make 64"),
        ({"text": {"rope_scaling": {"mrope_interleaved": False}}}, "mrope_interleaved: is False, only True"),
        ({"vision": {"hidden_act": "silu"}}, "vision_config.hidden_act: is 'silu', only 'gelu_pytorch_tanh'"),
        ({"vision": {"rope_parameters": {"rope_theta": 5.0}}}, "vision_config.rope_parameters.rope_theta: is 5.0"),
        ({"vision": {"num_heads": 10}}, "vision_config.hidden_size: 1152 must be a multiple of 4 x 10 heads"),
        ({"vision": {"num_position_embeddings": 2305}}, "num_position_embeddings: 2305 must be a square"),
        ({"vision": {"out_hidden_size": 2048}}, "out_hidden_size: 2048 must equal the decoder's 4096"),
        ({"vision": {"deepstack_visual_indexes": [8, 24, 16]}}, r"\[8, 24, 16\] must rise and be of the blocks 0 to"),
        ({"vision": {"deepstack_visual_indexes": [8, 27]}}, "must rise and be of the blocks 0 to 26"),
        ({"text": {"num_hidden_layers": 2}}, "deepstack_visual_indexes: 3 outputs are more than 2 decoder layers"),
    ],
    ids=str,
)
def test_what_the_graphs_do_not_do_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CapaError, match=message):
        model_dims(published(**changes))


def test_flops_follow_heads_of_their_own_size() -> None:
    dims = model_dims(published("4B"))
    dense = flops(dims.decoder, num_visual=1, num_text=0, schedule=(), linear_layers=()).dense
    assert dense.projections == 36 * 2 * 2560 * 128 * (32 + 8 + 8 + 32)
    tower = dims.vision
    fewer = replace(tower, depth=tower.depth - 1)
    assert tower.flops(256) - fewer.flops(256) == 2 * 1024 * 12 * 1024**2 + 4 * 1024**2 * 1024
    flat = replace(tower, deepstack_visual_indexes=())
    assert tower.flops(256) - flat.flops(256) == 3 * 2 * 256 * (4096**2 + 4096 * 2560)
