"""InternVL3's and InternVL3.5's tower, prompts, config and decoders against transformers, and the golden graphs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLProcessor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from capa_export.base.errors import CapaError
from capa_export.base.toml import shipped
from capa_export.config.recipe import load_recipe
from capa_export.export.graphs import write_onnx
from capa_export.graph.decoder import decode_model, prefill_model
from capa_export.graph.rotary import rotary_tables
from capa_export.model.checkpoint import open_checkpoint
from capa_export.model.families import internvl3, load_family
from capa_export.model.prompt import Picture, Prompter
from capa_export.model.source import Source
from capa_export.model.tensors import check_tensors
from capa_export.plan.flops import parameters
from capa_export.run.onnx import OnnxModel
from tests.agreement import compare
from tests.conftest import noise
from tests.models.internvl3 import (
    CHAT_TEMPLATE,
    QWEN3,
    SIDE,
    build_image_processor,
    build_tokenizer,
    random_model,
    save_model,
    small_config,
)


@pytest.fixture(scope="module", params=[{}, QWEN3], ids=["InternVL3", "InternVL3.5"])
def model(request: pytest.FixtureRequest) -> InternVLForConditionalGeneration:
    return random_model(text=request.param)


@pytest.fixture(scope="module")
def checkpoint(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("checkpoint"), model)


@pytest.fixture(scope="module")
def source(checkpoint: Path) -> Source:
    return Source.of(open_checkpoint(str(checkpoint)), internvl3)


@pytest.fixture(scope="module")
def prompter(checkpoint: Path, source: Source) -> Prompter:
    return Prompter(checkpoint, checkpoint, internvl3, source.dims)


def _accept(*_: object) -> None: ...


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> InternVLProcessor:
    """transformers' own processor, without the video processor that needs torchvision."""
    monkeypatch.setattr(InternVLProcessor, "check_argument_for_proper_class", _accept)
    return InternVLProcessor(
        build_image_processor(), build_tokenizer(), None, image_seq_length=4, chat_template=CHAT_TEMPLATE
    )


Build = Callable[..., OnnxModel]
SCALES = {1: np.linspace(0.5, 1.5, 64), 3: np.linspace(1.2, 0.8, 64)}


@pytest.fixture(scope="module")
def built(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """ONNX of the small model, each variant written once."""
    made: dict[str, OnnxModel] = {}

    def build(layers: tuple[int, ...] = (2,), precision: str = "fp32") -> OnnxModel:
        key = f"{layers} {precision}"
        if key not in made:
            folder = tmp_path_factory.mktemp("onnx")
            write_onnx(source, precision, folder, prune_layers=layers, scales=SCALES)
            made[key] = OnnxModel(folder, threads=1)
        return made[key]

    return build


def compare_vision(model: Any, onnx: OnnxModel, tiles: int, tolerance: float) -> None:
    pixels = torch.randn(tiles, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(tiles))
    with torch.no_grad():
        expected = model.model.get_image_features(pixels).pooler_output.flatten(0, 1).numpy()
    features = onnx.see(Picture(pixels.numpy(), len(expected)))
    np.testing.assert_allclose(features, expected, atol=tolerance * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("tiles", [1, 2, 13])
def test_vision_tower_equals_transformers(model: Any, built: Build, tiles: int) -> None:
    compare_vision(model, built(), tiles, 1e-5)


VARIANTS = {
    "6B tower": {"norm_type": "rms_norm", "use_qk_norm": True, "attention_bias": False},
    "final norm": {"use_mean_pooling": False, "layer_norm_eps": 0.1},
    "more patches": {"patch_size": [7, 7]},
}


@pytest.mark.parametrize("vision", VARIANTS.values(), ids=VARIANTS)
def test_vision_variants_equal_transformers(vision: dict[str, Any], tmp_path: Path) -> None:
    model = random_model(vision=vision)
    source = Source.of(open_checkpoint(str(save_model(tmp_path / "checkpoint", model))), internvl3)
    write_onnx(source, "fp32", tmp_path / "onnx", prune_layers=(2,), scales={})
    compare_vision(model, OnnxModel(tmp_path / "onnx", threads=1), 2, 1e-5)
    assert parameters(source.dims).total == sum(parameter.numel() for parameter in model.parameters())


PICTURES = {
    "one tile": [noise(56, 56)],
    "many tiles": [noise(224, 112)],
    "several": [noise(112, 168, 1), noise(56, 56, 2), noise(170, 56, 3)],
    "none": [],
}
TILES = {"one tile": [1], "many tiles": [9], "several": [7, 1, 4], "none": []}


@pytest.mark.parametrize("name", PICTURES)
def test_prompt_equals_the_processors(model: Any, prompter: Prompter, processor: Any, name: str) -> None:
    pictures = PICTURES[name]
    prompt = prompter("what color is the star ?", pictures)
    content = [{"type": "image"} for _ in pictures] + [{"type": "text", "text": "what color is the star ?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    expected = processor(images=pictures or None, text=[text], return_tensors="np")
    np.testing.assert_array_equal(prompt.input_ids, expected["input_ids"][0])
    assert [len(picture.patches) for picture in prompt.pictures] == TILES[name]
    assert [picture.num_tokens for picture in prompt.pictures] == [4 * count for count in TILES[name]]
    if pictures:
        tiles = np.concatenate([picture.patches for picture in prompt.pictures])
        np.testing.assert_array_equal(tiles, expected["pixel_values"])
    with torch.no_grad():
        whole = model(**{key: torch.from_numpy(np.asarray(value)) for key, value in expected.items()}).logits
        embeds, position_ids = internvl3.eager_inputs(model, prompt)
        by_hand = model(inputs_embeds=embeds, position_ids=position_ids).logits
    torch.testing.assert_close(by_hand, whole)
    np.testing.assert_array_equal(prompt.position_ids, position_ids.numpy())
    assert prompt.next_position == len(prompt.input_ids)


def test_prompt_follows_the_chat_template(prompter: Prompter) -> None:
    prompt = prompter("what color is the star ?", [noise(56, 56)])
    text = prompter.tokenizer.decode(prompt.input_ids).replace(" ", "")
    pads = "<IMG_CONTEXT>" * 4
    assert text == f"<|im_start|>user\n<img>{pads}</img>\nwhatcoloristhestar?<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.pictures[0].grid == (2, 2)


def test_prompt_beyond_the_plain_rope_is_refused(tmp_path: Path) -> None:
    folder = save_model(tmp_path, random_model())
    prompter = Prompter(folder, folder, internvl3, internvl3.model_dims(small_config().to_dict()))
    with pytest.raises(CapaError, match="more than the 512 of this decoder's context"):
        prompter("what color is the star ?", [noise(224, 168)] * 10)


def test_tiles_of_another_size_are_refused(prompter: Prompter, source: Source) -> None:
    processed = GotOcr2ImageProcessorPil(size={"height": 28, "width": 28})(images=[noise(9, 9)], return_tensors="np")
    with pytest.raises(CapaError, match=r"tiles of \[3, 28, 28\], the vision tower takes \[3, 56, 56\]"):
        internvl3.pictures(processed, source.dims)


@pytest.mark.parametrize("pictures", PICTURES.values(), ids=PICTURES)
@pytest.mark.parametrize("layers", [(2,), (1, 3)], ids=str)
def test_fp32_equals_eager_capa(
    model: Any, prompter: Prompter, built: Build, layers: tuple[int, ...], pictures: list[Any]
) -> None:
    prompt = prompter("what color is the star ?", pictures)
    keep = {
        layer: min(prompt.num_visual, max(1, prompt.num_visual // (3 * stage))) for stage, layer in enumerate(layers, 1)
    }
    # 1e-5: FP32 sums in another order, over at most 70 tokens.
    compare(internvl3, model, built(layers), prompt, keep, SCALES, 1e-5)


@pytest.mark.parametrize("pictures", PICTURES.values(), ids=PICTURES)
def test_fp16_stays_close(model: Any, prompter: Prompter, built: Build, pictures: list[Any]) -> None:
    prompt = prompter("what color is the star ?", pictures)
    # 1e-2: half has 11 bits, and errors of five layers add up.
    compare(internvl3, model, built(precision="fp16"), prompt, {2: prompt.num_visual // 4}, SCALES, 1e-2)


def test_both_tensor_layouts_load(model: Any, checkpoint: Path, source: Source, tmp_path: Path) -> None:
    """transformers 5 reads both and writes the one of transformers 4 unless told otherwise."""
    save_model(tmp_path, model, save_original_format=False)
    other = Source.of(open_checkpoint(str(tmp_path)), internvl3)
    assert "language_model.model.norm.weight" in source.checkpoint.tensors
    assert "language_model.lm_head.weight" in source.checkpoint.tensors
    assert "model.language_model.norm.weight" in other.checkpoint.tensors
    assert set(source.tensors) == set(other.tensors)
    for found in (source, other):
        check_tensors(found)


def test_tied_head_is_the_embedding(tmp_path: Path) -> None:
    model = random_model(tie=True)
    source = Source.of(open_checkpoint(str(save_model(tmp_path, model))), internvl3)
    check_tensors(source)
    assert source.tensors["lm_head.weight"] == source.tensors["model.embed_tokens.weight"]
    assert parameters(source.dims).total == sum(parameter.numel() for parameter in model.parameters())


# Hidden size, FFN size, layers, query heads, KV heads; `3.5` has a Qwen3 decoder.
SIZES = {
    "3-1B": (896, 4864, 24, 14, 2),
    "3-2B": (1536, 8960, 28, 12, 2),
    "3-8B": (3584, 18944, 28, 28, 4),
    "3.5-1B": (1024, 3072, 28, 16, 8),
    "3.5-2B": (2048, 6144, 28, 16, 8),
    "3.5-4B": (2560, 9728, 36, 32, 8),
    "3.5-8B": (4096, 12288, 36, 32, 8),
}
_QWEN2_TEXT = {
    "model_type": "qwen2",
    "max_position_embeddings": 32768,
    "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"},
    "vocab_size": 151674,
}
_QWEN3_TEXT = {
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "rope_scaling": None,
    "vocab_size": 151936,
}


def published(size: str) -> dict[str, Any]:
    """The config of transformers 4, with the numbers of a published size."""
    hidden, inner, layers, heads, kv_heads = SIZES[size]
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "downsample_ratio": 0.5,
        "image_seq_length": 256,
        "image_token_id": 151667 if size.startswith("3-") else 151671,
        "projector_hidden_act": "gelu",
        "text_config": {
            "hidden_act": "silu",
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_attention_heads": heads,
            "num_hidden_layers": layers,
            "num_key_value_heads": kv_heads,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "use_sliding_window": False,
            **(_QWEN2_TEXT if size.startswith("3-") else _QWEN3_TEXT),
        },
        "vision_config": {
            "attention_bias": True,
            "hidden_size": 1024,
            "image_size": [448, 448],
            "intermediate_size": 4096,
            "layer_norm_eps": 1e-06,
            "model_type": "internvl_vision",
            "norm_type": "layer_norm",
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": [14, 14],
            "use_absolute_position_embeddings": True,
            "use_mask_token": False,
            "use_mean_pooling": True,
            "use_qk_norm": False,
        },
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
    }


@pytest.mark.parametrize("size", SIZES)
def test_published_dimensions(size: str) -> None:
    config = published(size)
    dims = internvl3.model_dims(config)
    assert dims.vision.tokens_per_tile == config["image_seq_length"]
    limit, qk_norm = (32768, False) if size.startswith("3-") else (None, True)
    assert (dims.decoder.rope_theta, dims.decoder.rope_limit, dims.decoder.position_axes) == (1e6, limit, 1)
    assert dims.decoder.qk_norm is qk_norm
    with torch.device("meta"):
        # transformers 4 took the head's ties from the text config, 5 takes them from the root.
        model = InternVLForConditionalGeneration(InternVLConfig(**config, tie_word_embeddings=False))
    assert parameters(dims).total == sum(parameter.numel() for parameter in model.parameters())
    assert internvl3.model_dims(model.config.to_dict()) == internvl3.model_dims(
        {**config, "tie_word_embeddings": False}
    )


@pytest.mark.parametrize("decoder", ["qwen2", "qwen3"])
def test_defaults_are_those_of_transformers(decoder: str) -> None:
    """Sizes apart, an empty config is the config class's own."""
    sizes = {
        "model_type": decoder,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 32,
    }
    given = {"model_type": "internvl", "text_config": sizes, "vision_config": {"hidden_size": 32}}
    # The class ties the head by default; a config.json of transformers 4 that says nothing does not.
    config = InternVLConfig(text_config=dict(sizes), vision_config={"hidden_size": 32})
    assert internvl3.model_dims({**given, "tie_word_embeddings": True}) == internvl3.model_dims(config.to_dict())


def test_vision_flops_count_whole_tiles() -> None:
    vision = internvl3.model_dims(published("3-8B")).vision
    tile = vision.flops(256)
    assert (vision.flops(1280), vision.flops(1025)) == (5 * tile, 5 * tile)
    # 24 blocks of 1025 tokens with 4 D^2 + 2 D F weights, their attention, patches and projector.
    blocks = 24 * (2 * 1025 * (4 * 1024**2 + 2 * 1024 * 4096) + 4 * 1025**2 * 1024)
    assert tile == blocks + 2 * 1024 * 1024 * 588 + 2 * 256 * (4096 * 3584 + 3584**2)


REFUSED = {
    "another model": ({"model_type": "llava"}, "this recipe is for 'internvl' and 'internvl_chat'"),
    "another decoder": ({"text_config.model_type": "llama"}, "text_config.model_type: is 'llama', and the graphs hold"),
    "experts": ({"text_config.model_type": "qwen3_moe"}, "'qwen3_moe', and the graphs hold dense Qwen2 and Qwen3"),
    "gpt-oss": ({"text_config.model_type": "gpt_oss"}, "'gpt_oss', and the graphs hold dense Qwen2 and Qwen3"),
    "biases": (
        {"text_config.model_type": "qwen3", "text_config.attention_bias": True},
        "text_config.attention_bias: is True, only False",
    ),
    "another ratio": ({"downsample_ratio": 0.25}, "downsample_ratio: is 0.25, only 0.5"),
    "another layer": ({"vision_feature_layer": -2}, "vision_feature_layer: is -2, only -1"),
    "[CLS] kept": ({"vision_feature_select_strategy": "full"}, "is 'full', only 'default'"),
    "another activation": ({"vision_config.hidden_act": "silu"}, "vision_config.hidden_act: is 'silu'"),
    "mask token": ({"vision_config.use_mask_token": True}, "use_mask_token: is True"),
    "no positions": ({"vision_config.use_absolute_position_embeddings": False}, "is False, only True"),
    "another norm": ({"vision_config.norm_type": "batch_norm"}, "only 'layer_norm' and 'rms_norm'"),
    "odd grid": ({"vision_config.image_size": 434}, "434 must be a multiple of 2 x 14"),
    "oblong tiles": ({"vision_config.image_size": [448, 224]}, "must be the same on every axis"),
    "uneven heads": ({"vision_config.num_attention_heads": 15}, "must be a multiple of 15 heads"),
    "another RoPE": ({"text_config.rope_scaling": {"rope_type": "yarn"}}, "'yarn', only 'default' and 'dynamic'"),
}


@pytest.mark.parametrize(("change", "why"), REFUSED.values(), ids=REFUSED)
def test_what_the_graphs_do_not_do_is_refused(change: dict[str, Any], why: str) -> None:
    config = published("3-1B")
    for key, value in change.items():
        *sections, last = key.split(".")
        (config[sections[0]] if sections else config)[last] = value
    with pytest.raises(CapaError, match=why):
        internvl3.model_dims(config)


def test_graph_names_lead_to_the_block(source: Source) -> None:
    names = [node.name for node in internvl3.vision_model(source.dims.vision, ir.DataType.FLOAT16).graph]
    assert len(names) == len(set(names))
    for name in (
        "vision_tower/embeddings/patch_embeddings/projection/Gemm",
        "vision_tower/encoder/layer.1/attention/q_proj/Gemm",
        "vision_tower/encoder/layer.0/layernorm_before/LayerNormalization",
        "multi_modal_projector/linear_2/Gemm",
    ):
        assert name in names


def test_shipped_recipe() -> None:
    recipe = load_recipe("internvl3")
    assert load_family(recipe.family) is internvl3


def test_goldens(request: pytest.FixtureRequest) -> None:
    """The graphs of the small model, as text without weights: they change only on purpose."""
    dims, half = internvl3.model_dims(small_config().to_dict()), ir.DataType.FLOAT16
    rotary = rotary_tables(dims)
    graphs = {
        "prefill": prefill_model(dims.decoder, half, rotary, prune_layers=(2,), linear_layers=(3,)),
        "decode": decode_model(dims.decoder, half, rotary, prune_layers=(2,)),
        "visual": internvl3.vision_model(dims.vision, half),
    }
    for name, graph in graphs.items():
        path = shipped("graphs") / "goldens" / "small-internvl3" / f"{name}.onnxtxt"
        text = ir.to_onnx_text(graph, exclude_initializers=True) + "\n"
        if request.config.getoption("--update-goldens"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert text == Path(path).read_text(encoding="utf-8"), f"{path} differs: pytest --update-goldens if meant"
