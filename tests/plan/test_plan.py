"""Dimensions read from configs, and the plan's numbers held against hand counts and real models."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.vision_utils import get_vision_window_index

from capa_export.base.dims import DecoderDims
from capa_export.base.errors import CapaError, ExitCode
from capa_export.export.graphs import DENSE, write_onnx
from capa_export.model.families.qwen25vl.dims import model_dims, vision_flops
from capa_export.model.prompt import Prompt, Prompter
from capa_export.model.source import Source
from capa_export.plan.flops import decode_flops, flops, kv_cache, parameters
from capa_export.run.onnx import OnnxModel
from tests.conftest import noise
from tests.graph.counting import graph_flops

PAPER_LAYERS = (2, 3, 4, 5, 13, 14, 15, 16, 17, 18, 19)


def published(size: str) -> dict[str, Any]:
    """The flat config of transformers 4, with the numbers of Qwen2.5-VL-3B or 7B."""
    sizes = {
        "3B": (2048, 11008, 36, 16, 2, 151936, True),
        "7B": (3584, 18944, 28, 28, 4, 152064, False),
    }
    hidden, inner, layers, heads, kv_heads, vocab, tie = sizes[size]
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": tie,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "use_sliding_window": False,
        "sliding_window": 32768,
        "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": hidden},
    }


TINY = DecoderDims(
    hidden_size=8,
    intermediate_size=12,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    vocab_size=10,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    mrope_section=(1, 1, 0),
    attention_bias=True,
    tie_word_embeddings=False,
)


@pytest.mark.parametrize("size", ["3B", "7B"])
def test_both_layouts_give_the_dimensions_of_transformers(size: str) -> None:
    flat = published(size)
    config = Qwen2_5_VLConfig(**json.loads(json.dumps(flat)))
    dims = model_dims(flat)
    assert model_dims(json.loads(config.to_json_string(use_diff=False))) == dims
    assert model_dims(json.loads(config.to_json_string())) == dims
    text, vision = config.text_config, config.vision_config
    assert dims.decoder.num_layers == text.num_hidden_layers
    assert dims.decoder.head_dim == 128
    assert dims.decoder.rms_norm_eps == text.rms_norm_eps == 1e-6
    assert dims.decoder.tie_word_embeddings is config.tie_word_embeddings is (size == "3B")
    assert dims.decoder.mrope_section == (16, 24, 24)
    assert dims.vision.fullatt_block_indexes == tuple(vision.fullatt_block_indexes)
    assert dims.image_token_id == config.image_token_id


def test_absent_keys_have_the_defaults_of_transformers() -> None:
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    text = {key: published("7B")[key] for key in keys} | {"num_attention_heads": 56, "hidden_size": 7168}
    vision = {"hidden_size": 1280, "out_hidden_size": 7168}
    config = Qwen2_5_VLConfig(text_config=dict(text), vision_config=dict(vision))
    dims = model_dims({"model_type": "qwen2_5_vl", "text_config": text, "vision_config": vision})
    assert dims.decoder.num_kv_heads == config.text_config.num_key_value_heads
    assert dims.decoder.vocab_size == config.text_config.vocab_size
    assert dims.decoder.rms_norm_eps == config.text_config.rms_norm_eps
    assert dims.decoder.rope_theta == config.text_config.rope_parameters["rope_theta"]
    assert dims.decoder.tie_word_embeddings is config.tie_word_embeddings
    for key in ("depth", "intermediate_size", "num_heads", "patch_size", "temporal_patch_size", "window_size"):
        assert getattr(dims.vision, key) == getattr(config.vision_config, key)
    text["num_key_value_heads"] = None  # pyright: ignore[reportArgumentType]
    dims = model_dims({"model_type": "qwen2_5_vl", "text_config": text, "vision_config": vision})
    assert dims.decoder.num_kv_heads == 56


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llava"}, "model_type is 'llava'"),
        ({"hidden_size": None}, "hidden_size: is missing"),
        ({"num_hidden_layers": "28"}, "num_hidden_layers: must be a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers: must be a whole number"),
        ({"rms_norm_eps": 0}, "rms_norm_eps: must be a number above 0"),
        ({"use_sliding_window": True}, "only full attention"),
        ({"layer_types": ["sliding_attention"]}, "only full attention"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling.rope_type: is 'yarn'"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24]}}, "rope_scaling.mrope_section"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": 64}}, "must be a list"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, "24"]}}, "rope_scaling.mrope_section[2]"),
        ({"hidden_act": "gelu"}, "hidden_act: is 'gelu', only 'silu'"),
        ({"num_attention_heads": 24}, "24 heads of 149 must make 3584"),
        ({"head_dim": 64}, "28 heads of 64 must make 3584"),
        ({"num_key_value_heads": 3}, "must be a multiple of 3"),
        ({"vision_config": None}, "vision_config: is missing"),
        ({"vision_config": []}, "vision_config: must be an object"),
        ({"vision_config": {"out_hidden_size": 3584}}, "vision_config.hidden_size: is missing"),
        ({"vision_config": {"hidden_size": 1280, "out_hidden_size": 2048}}, "must equal the decoder's 3584"),
        ({"vision_config": {"hidden_size": 1280, "hidden_act": "gelu"}}, "vision_config.hidden_act"),
        ({"vision_config": {"hidden_size": 1280, "patch_size": [14, 16]}}, "the same on every axis"),
        ({"vision_config": {"hidden_size": 1290}}, "must be a multiple of 4 x 16"),
        ({"vision_config": {"hidden_size": 1280, "window_size": 14}}, "hold no merged patch"),
        ({"vision_config": {"hidden_size": 1280, "rope_parameters": {"rope_theta": 5e3}}}, "rope_theta: is 5000.0"),
    ],
)
def test_configs_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CapaError) as info:
        model_dims(published("7B") | changes, where="model/config.json")
    assert str(info.value).startswith("model/config.json: ")
    assert message in str(info.value)
    assert info.value.code == ExitCode.PREFLIGHT


@pytest.mark.parametrize("size", ["3B", "7B"])
def test_parameters_are_those_of_the_real_model(size: str) -> None:
    config = published(size)
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**json.loads(json.dumps(config))))
    counted = parameters(model_dims(config))
    assert counted.total == sum(weight.numel() for weight in model.parameters())
    assert counted.vision == sum(weight.numel() for weight in model.model.visual.parameters())
    layers = model.model.language_model
    assert counted.decoder + counted.embedding == sum(weight.numel() for weight in layers.parameters())
    assert counted.bytes["bf16"] == 2 * counted.total
    assert json.loads(json.dumps(asdict(counted)))["total"] == counted.total


def test_prefill_by_hand() -> None:
    """5 visual and 3 text tokens; layer 1 keeps 2; layers 1 and 2 are linear."""
    counted = flops(TINY, num_visual=5, num_text=3, schedule=[(1, 2)], linear_layers=[2, 1])
    # q and o: 8 x 8 each, k and v: 8 x 4 each.
    assert counted.dense.projections == 2 * 192 * 8 * 3
    assert counted.dense.attention == 2 * 2 * 8 * 8 * 8 * 3
    assert counted.dense.attention_causal == 2 * 2 * 36 * 8 * 3
    assert counted.dense.ffn == 2 * 3 * 8 * 12 * 8 * 3
    assert (counted.dense.score, counted.dense.lm_head) == (0, 2 * 8 * 10)
    # 8, 8 and 5 tokens enter the layers; 8 tokens, 3 text and 3 text go through the FFNs.
    assert counted.capa.projections == 2 * 192 * (8 + 8 + 5)
    assert counted.capa.attention == 2 * 2 * 8 * (64 + 64 + 25)
    assert counted.capa.attention_causal == 2 * 2 * 8 * (36 + 36 + 15)
    assert counted.capa.ffn == 2 * 3 * 8 * 12 * (8 + 3 + 3) + 2 * (2 * 8)
    assert counted.capa.score == 8 * (2 * 8 + 8 + 2 * 8 * 8)
    assert counted.capa.total == sum(
        (counted.capa.projections, counted.capa.attention, counted.capa.ffn, counted.capa.score, 160)
    )
    assert counted.capa.total_causal == counted.capa.total - counted.capa.attention + counted.capa.attention_causal
    assert counted.ratio == counted.dense.total / counted.capa.total
    assert counted.capa_visual.projections == 2 * 192 * (5 + 5 + 2)
    assert counted.capa_visual.lm_head == 0
    assert counted.capa_visual.ffn == 2 * 3 * 8 * 12 * 5 + 2 * (2 * 8)
    assert json.loads(json.dumps(asdict(counted)))["capa"]["ffn"] == counted.capa.ffn


def test_no_pruning_and_no_linear_layers_cost_what_dense_costs() -> None:
    counted = flops(TINY, num_visual=5, num_text=3, schedule=[], linear_layers=[])
    assert counted.capa == counted.dense
    assert counted.ratio == counted.ratio_visual == 1
    assert flops(TINY, num_visual=0, num_text=3, schedule=[(0, 0)], linear_layers=[]).ratio_visual == 1


def test_the_paper_headline() -> None:
    """75 % pruned at layer 3 with the paper's FFN layers: 78 % of the visual tokens' FLOPs are gone at 7B."""
    decoder = model_dims(published("7B")).decoder
    counted = flops(decoder, num_visual=1024, num_text=48, schedule=[(3, 256)], linear_layers=PAPER_LAYERS)
    assert 1 - 1 / counted.ratio_visual == pytest.approx(0.78, abs=0.015)
    assert counted.ratio < counted.ratio_visual


def test_kv_cache_by_hand() -> None:
    cache = kv_cache(TINY, num_visual=5, num_text=3, schedule=[(0, 4), (1, 2)], element_bytes=4)
    assert [(g.first_layer, g.last_layer, g.num_tokens) for g in cache.groups] == [(0, 0, 7), (1, 2, 5)]
    assert cache.dense_bytes == 3 * 8 * 2 * 4 * 4
    assert cache.capa_bytes == (7 + 5 + 5) * 2 * 4 * 4
    assert len(kv_cache(TINY, num_visual=5, num_text=3, schedule=[]).groups) == 1


def test_decode_by_hand() -> None:
    counted = decode_flops(TINY, num_visual=5, num_text=3, schedule=[(1, 2)])
    linear = 2 * (3 * (192 + 3 * 8 * 12) + 80)
    assert counted.dense == linear + 4 * 8 * (9 + 9 + 9)
    assert counted.capa == linear + 4 * 8 * (9 + 6 + 6)


@pytest.mark.parametrize(
    ("schedule", "linear"),
    [([(3, 2)], []), ([(1, 2), (1, 1)], []), ([(1, 2), (2, 3)], []), ([(1, 6)], []), ([(0, -1)], []), ([], [3])],
)
def test_schedules_that_do_not_fit_are_refused(schedule: list[tuple[int, int]], linear: list[int]) -> None:
    with pytest.raises(CapaError) as info:
        flops(TINY, num_visual=5, num_text=3, schedule=schedule, linear_layers=linear)
    assert info.value.code == ExitCode.USAGE


@pytest.mark.parametrize("grid", [(1, 8, 8), (1, 26, 38), (2, 10, 6)])
def test_vision_windows_are_those_of_transformers(grid: tuple[int, int, int]) -> None:
    dims = model_dims(published("7B")).vision
    frames, rows, cols = grid
    _, bounds = get_vision_window_index(torch.tensor([grid]), dims.spatial_merge_size, dims.window_size, 14)
    counted = vision_flops(dims, rows=rows, cols=cols, frames=frames)
    assert counted.window_attention == 28 * 4 * 1280 * int((bounds.diff() ** 2).sum())
    assert counted.full_attention == 4 * 4 * 1280 * frames * (rows * cols) ** 2
    assert counted.num_visual * 4 == counted.num_patches == frames * rows * cols
    assert counted.patch_embed == 2 * counted.num_patches * 1280 * 1176
    assert counted.merger == 2 * counted.num_visual * 5120 * (5120 + 3584)


def test_a_grid_that_cannot_be_merged_is_refused() -> None:
    with pytest.raises(CapaError, match="must be a multiple of 2"):
        vision_flops(model_dims(published("7B")).vision, rows=3, cols=4)


LAYERS, LINEAR = (1, 3), {1: np.full(64, 1.1), 2: np.full(64, 0.9)}


@pytest.fixture(scope="module")
def exported(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("counted")
    write_onnx(source, "fp32", folder, prune_layers=LAYERS, scales=LINEAR, dense=True)
    return folder


@pytest.fixture(scope="module")
def prompt(prompter: Prompter) -> Prompt:
    return prompter("what color is the star ?", [noise(224, 140), noise(84, 84, 1)])


@pytest.mark.parametrize("file", ["prefill.onnx", DENSE])
def test_prefill_flops_are_those_of_the_exported_graph(
    exported: Path, source: Source, prompt: Prompt, file: str
) -> None:
    dims, num_text = source.dims.decoder, len(prompt.text_positions)
    keep, linear = ([20, 7], list(LINEAR)) if file != DENSE else ([prompt.num_visual] * 2, [])
    counted = graph_flops(
        exported / "llm" / file,
        {
            **OnnxModel(exported).embed(prompt),
            "position_ids": prompt.position_ids,
            "text_positions": prompt.text_positions,
            "num_keep": np.array(keep),
        },
    )
    planned = flops(
        dims,
        num_visual=prompt.num_visual,
        num_text=num_text,
        schedule=list(zip(LAYERS, keep, strict=True)),
        linear_layers=linear,
    ).capa

    def total(part: str) -> int:
        return sum(count for name, count in counted.items() if part in name)

    assert total("_proj/Gemm") - total("mlp") == planned.projections
    assert total("self_attn/Attention") == planned.attention
    assert total("lm_head") == planned.lm_head
    # Products with a vector are no matrix products: the scale of visual tokens, the weighting of the values.
    left = dict(zip(LAYERS, keep, strict=True))
    assert total("mlp") == planned.ffn - sum(left[1] * dims.hidden_size for _ in linear)
    entering = [prompt.num_visual + num_text, keep[0] + num_text]
    assert total("capa") == planned.score - sum(entering) * dims.num_heads * dims.head_dim
    assert sum(counted.values()) == sum(map(total, ("_proj/Gemm", "self_attn/Attention", "lm_head", "capa")))


def test_decode_flops_are_those_of_the_exported_graph(exported: Path, source: Source, prompt: Prompt) -> None:
    onnx, keep = OnnxModel(exported), [20, 7]
    cache = onnx.prefill(prompt, keep).cache
    feed = {
        "inputs_embeds": np.zeros((1, 1, 64), np.float32),
        "position_ids": np.full((3, 1, 1), prompt.next_position),
        "past_lengths": cache.lengths,
    }
    counted = graph_flops(exported / "llm" / "decode.onnx", {**feed, **cache.tensors})
    planned = decode_flops(
        source.dims.decoder,
        num_visual=prompt.num_visual,
        num_text=len(prompt.text_positions),
        schedule=list(zip(LAYERS, keep, strict=True)),
    )
    # The cache of a prune layer is pruned already.
    assert sum(counted.values()) == planned.capa


def test_vision_flops_are_those_of_the_exported_graph(exported: Path, source: Source, prompter: Prompter) -> None:
    """On whole windows; the graph pads others."""
    [picture] = prompter("", [noise(448, 224)]).pictures
    counted = graph_flops(exported / "visual" / "model.onnx", {"pixel_values": picture.patches})
    frames, rows, cols = picture.patches.shape[:3]
    assert sum(counted.values()) == vision_flops(source.dims.vision, rows=2 * rows, cols=2 * cols, frames=frames).total
