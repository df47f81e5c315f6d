"""LLaVA-1.5 against transformers: dimensions, tensor names, vision tower, prompts, and eager CAPA."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from capa_export.checkpoint import open_checkpoint
from capa_export.errors import CapaError
from capa_export.export import Source, check_tensors, write_onnx
from capa_export.families import llava15
from capa_export.families.llava15.dims import Vision, model_dims
from capa_export.graph.decoder import decode_model, prefill_model
from capa_export.graph.rotary import rotary_tables
from capa_export.plan import parameters
from capa_export.prompt import Picture, Prompter
from capa_export.runtime import OnnxModel
from capa_export.shipped import shipped
from tests.agreement import compare
from tests.conftest import noise

TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
SPECIAL = ("<unk>", "<s>", "</s>", "<image>", "<pad>")
WORDS = ("USER:", "ASSISTANT:", "\n", "what", "color", "is", "the", "star", "?", "red", "blue", "Describe", "image.")
SIDE, PATCH = 56, 14


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Word by word; like Llama's, it puts `<s>` in front."""
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate((*SPECIAL, *WORDS))}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(Regex("[ \t]+"), "removed")]
    )
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=TEMPLATE,
    )


def build_image_processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})


def random_model(seed: int = 0, **options: Any) -> LlavaForConditionalGeneration:
    """Five decoder layers with as many KV heads as query heads; four vision layers, the third of which is taken."""
    config = LlavaConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": len(SPECIAL) + len(WORDS) + 14,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        },
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "image_size": SIDE,
            "patch_size": PATCH,
        },
        image_token_index=SPECIAL.index("<image>"),
        **options,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Zero biases and unit norms would hide a mistake in either.
            if name.endswith("bias"):
                parameter.normal_(0, 0.2)
            elif parameter.ndim == 1:
                parameter.normal_(1, 0.2)
            else:
                parameter.normal_(0, 0.6 * parameter[0].numel() ** -0.5)
    return model


def save_model(folder: Path, model: LlavaForConditionalGeneration, **options: Any) -> Path:
    """A whole checkpoint folder, tokenizer and image processor included."""
    model.generation_config.eos_token_id = SPECIAL.index("</s>")
    model.save_pretrained(folder, **options)
    build_tokenizer().save_pretrained(folder)
    build_image_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    return random_model()


@pytest.fixture(scope="module")
def checkpoint(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("checkpoint"), model)


@pytest.fixture(scope="module")
def source(checkpoint: Path) -> Source:
    return Source.of(open_checkpoint(str(checkpoint)), llava15)


@pytest.fixture(scope="module")
def prompter(checkpoint: Path, source: Source) -> Prompter:
    return Prompter(checkpoint, checkpoint, llava15, source.dims)


# Dimensions.

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
        ({"quantization_config": {"bits": 4}}, "quantization_config: use the checkpoint in bf16"),
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
    tower: Vision = model_dims(published()).vision
    once = tower.flops(576)
    assert tower.flops(577) == tower.flops(1152) == 2 * once
    assert once - replace(tower, num_run_layers=22).flops(576) == 577 * 2 * 12 * 1024**2 + 4 * 577**2 * 1024


# Tensor names.


def relaid(checkpoint: Path, folder: Path, layout: str, model: LlavaForConditionalGeneration) -> Path:
    """The checkpoint with its tensors named as another version saves them."""
    shutil.copytree(checkpoint, folder)
    if layout == "model":
        model.save_pretrained(folder, save_original_format=False)
    elif layout == "hub":
        tensors = load_file(folder / "model.safetensors")
        tower = "vision_tower."
        named = {
            name.replace(tower, f"{tower}vision_model.") if name.startswith(tower) else name: tensor
            for name, tensor in tensors.items()
        }
        save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


LAYOUTS = {
    "model": "model.vision_tower.pre_layrnorm.weight",
    "hub": "vision_tower.vision_model.pre_layrnorm.weight",
    "saved": "vision_tower.pre_layrnorm.weight",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_files(model: Any, checkpoint: Path, tmp_path: Path, layout: str) -> None:
    folder = relaid(checkpoint, tmp_path / "checkpoint", layout, model)
    found = open_checkpoint(str(folder))
    assert LAYOUTS[layout] in found.tensors
    source = Source.of(found, llava15)
    check_tensors(source)
    write_onnx(source, "fp32", tmp_path / "onnx", prune_layers=(2,), scales={})
    write_onnx(
        Source.of(open_checkpoint(str(checkpoint)), llava15), "fp32", tmp_path / "other", prune_layers=(2,), scales={}
    )
    for file in ("visual/model.onnx.data", "llm/model.onnx.data", "llm/embedding.safetensors"):
        assert (tmp_path / "onnx" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()
    # The eager reference must read the layout too.
    loaded = LlavaForConditionalGeneration.from_pretrained(folder)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


def test_a_tensor_from_elsewhere_is_refused(source: Source) -> None:
    # Tensors are told apart by where they lie.
    spare = replace(next(iter(source.tensors.values())), offset=0)
    for name in ("vision_tower.adapter.weight", "multi_modal_projector.linear_3.weight"):
        with pytest.raises(CapaError, match=f"tensor {name} has no place in LlavaForConditionalGeneration"):
            check_tensors(replace(source, tensors={**source.tensors, name: spare}))


# Vision tower.


def see(model: Any, folder: Path, tmp_path: Path, num_pictures: int) -> tuple[np.ndarray, np.ndarray]:
    """Visual tokens of random pictures from ONNX and from transformers."""
    source = Source.of(open_checkpoint(str(folder)), llava15)
    write_onnx(source, "fp32", tmp_path / "onnx", prune_layers=(2,), scales={})
    pixels = torch.randn(num_pictures, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = torch.cat(list(model.get_image_features(pixels).pooler_output)).numpy()
    return OnnxModel(tmp_path / "onnx", threads=1).see(Picture(pixels.numpy(), len(expected))), expected


@pytest.mark.parametrize("num_pictures", [1, 3])
def test_vision_tower_equals_transformers(model: Any, checkpoint: Path, tmp_path: Path, num_pictures: int) -> None:
    features, expected = see(model, checkpoint, tmp_path, num_pictures)
    assert len(features) == 16 * num_pictures
    np.testing.assert_allclose(features, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"vision_feature_layer": -1},
        {"vision_feature_layer": 2},
        {"vision_feature_select_strategy": "full"},
        {"multimodal_projector_bias": False},
    ],
    ids=str,
)
def test_variants_equal_transformers(tmp_path: Path, options: dict[str, Any]) -> None:
    model = random_model(3, **options)
    folder = save_model(tmp_path / "checkpoint", model)
    source = Source.of(open_checkpoint(str(folder)), llava15)
    check_tensors(source)
    assert parameters(source.dims).total == model.num_parameters()
    features, expected = see(model, folder, tmp_path, 2)
    assert len(features) == 2 * source.dims.vision.num_tokens
    np.testing.assert_allclose(features, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


# Prompts.

PICTURES = {"one": [noise(80, 56)], "three": [noise(30, 90, 1), noise(56, 56, 2), noise(200, 70, 3)], "none": []}


@pytest.mark.parametrize("pictures", PICTURES.values(), ids=PICTURES)
def test_prompts_equal_those_of_the_processor(prompter: Prompter, pictures: list[Any]) -> None:
    processor = LlavaProcessor(
        build_image_processor(),
        build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    content: list[Any] = [{"type": "image", "image": picture} for picture in pictures]
    content.append({"type": "text", "text": "what color is the star ?"})
    expected = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="np",
    )
    prompt = prompter("what color is the star ?", pictures)
    np.testing.assert_array_equal(prompt.input_ids, expected["input_ids"][0])
    assert prompt.num_visual == 16 * len(pictures)
    assert [picture.patches.shape for picture in prompt.pictures] == [(1, 3, SIDE, SIDE)] * len(pictures)
    assert [(picture.grid, picture.square) for picture in prompt.pictures] == [((4, 4), True)] * len(pictures)
    if pictures:
        pixels = np.concatenate([picture.patches for picture in prompt.pictures])
        np.testing.assert_array_equal(pixels, expected["pixel_values"])


def test_prompt_follows_the_chat_template(prompter: Prompter) -> None:
    prompt = prompter("what color is the star ?", [noise(56, 84)])
    words = prompter.tokenizer.convert_ids_to_tokens(prompt.input_ids[~prompt.is_visual])
    assert words == ["<s>", "USER:", "\n", "what", "color", "is", "the", "star", "?", "ASSISTANT:"]
    assert prompt.text_positions.tolist() == [0, 1, *range(18, 26)]


def test_a_template_that_writes_the_first_token_gets_no_second_one(prompter: Prompter, checkpoint: Path) -> None:
    writes = Prompter(checkpoint, checkpoint, llava15, prompter.dims)
    writes.tokenizer.chat_template = "{{ bos_token }}" + TEMPLATE
    np.testing.assert_array_equal(writes("what ?", []).input_ids, prompter("what ?", []).input_ids)


def test_the_template_of_an_older_checkpoint_is_found(prompter: Prompter, checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "old"))
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(CapaError, match="the tokenizer has no chat template"):
        Prompter(folder, folder, llava15, prompter.dims)
    (folder / "chat_template.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CapaError, match=r"chat_template.json: holds no chat template"):
        Prompter(folder, folder, llava15, prompter.dims)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}), encoding="utf-8")
    older = Prompter(folder, folder, llava15, prompter.dims)
    np.testing.assert_array_equal(older("what ?", []).input_ids, prompter("what ?", []).input_ids)


def test_pictures_of_another_size_are_refused(prompter: Prompter, checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "other"))
    CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    with pytest.raises(CapaError, match=r"makes pictures of \[3, 28, 28\], config.json implies \[3, 56, 56\]"):
        Prompter(folder, folder, llava15, prompter.dims)("what ?", [noise(56, 56)])


@pytest.mark.parametrize("pictures", PICTURES.values(), ids=PICTURES)
def test_eager_inputs_are_those_of_the_models_own_forward(model: Any, prompter: Prompter, pictures: list[Any]) -> None:
    prompt = prompter("what color is the star ?", pictures)
    embeds, position_ids = llava15.eager_inputs(model, prompt)
    np.testing.assert_array_equal(prompt.position_ids, position_ids.numpy())
    assert prompt.next_position == len(prompt.input_ids)
    whole: dict[str, Any] = {"input_ids": torch.from_numpy(prompt.input_ids)[None]}
    if pictures:
        pixels = np.concatenate([picture.patches for picture in prompt.pictures])
        whole["pixel_values"] = torch.from_numpy(pixels)
    with torch.no_grad():
        expected = model(**whole).logits
        logits = model(inputs_embeds=embeds, position_ids=position_ids).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)


# CAPA.

SCALES = {1: np.linspace(0.5, 1.5, 64), 3: np.linspace(1.2, 0.8, 64)}
Build = Callable[..., OnnxModel]


@pytest.fixture(scope="module")
def built(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """ONNX of the small model, each variant written once."""
    made: dict[str, OnnxModel] = {}

    def build(
        layers: tuple[int, ...] = (2,), scales: Mapping[int, np.ndarray] = SCALES, precision: str = "fp32"
    ) -> OnnxModel:
        key = f"{layers} {sorted(scales)} {precision}"
        if key not in made:
            folder = tmp_path_factory.mktemp("onnx")
            write_onnx(source, precision, folder, prune_layers=layers, scales=scales)
            made[key] = OnnxModel(folder, threads=1)
        return made[key]

    return build


@pytest.mark.parametrize("pictures", PICTURES.values(), ids=PICTURES)
@pytest.mark.parametrize("layers", [(2,), (1, 3)], ids=str)
def test_fp32_equals_eager_capa(
    model: Any, prompter: Prompter, built: Build, layers: tuple[int, ...], pictures: list[Any]
) -> None:
    prompt = prompter("what color is the star ?", pictures)
    keep = {
        layer: min(prompt.num_visual, max(1, prompt.num_visual // (3 * stage))) for stage, layer in enumerate(layers, 1)
    }
    # 1e-5: FP32 sums in another order, over at most 60 tokens.
    compare(llava15, model, built(layers), prompt, keep, SCALES, 1e-5)


@pytest.mark.parametrize("pictures", PICTURES.values(), ids=PICTURES)
def test_fp16_stays_close(model: Any, prompter: Prompter, built: Build, pictures: list[Any]) -> None:
    prompt = prompter("what color is the star ?", pictures)
    # 1e-2: half has 11 bits, and errors of five layers add up.
    compare(llava15, model, built(precision="fp16"), prompt, {2: prompt.num_visual // 4}, SCALES, 1e-2)


def test_without_pruning_or_scales_it_is_the_dense_model(model: Any, prompter: Prompter, built: Build) -> None:
    prompt = prompter("what color is the star ?", [noise(56, 84)])
    pixels = torch.from_numpy(prompt.pictures[0].patches)
    with torch.no_grad():
        dense = model(input_ids=torch.from_numpy(prompt.input_ids)[None], pixel_values=pixels).logits[0, -1].numpy()
    run = built(scales={}).prefill(prompt, [prompt.num_visual])
    np.testing.assert_allclose(run.logits, dense, atol=1e-5 * np.abs(dense).max(), rtol=0)


def test_goldens(request: pytest.FixtureRequest, source: Source) -> None:
    """The graphs of the small model, as text without weights: they change only on purpose."""
    dims, half = source.dims, ir.DataType.FLOAT16
    rotary = rotary_tables(dims)
    models = {
        "prefill": prefill_model(dims.decoder, half, rotary, prune_layers=(2,), linear_layers=(3,)),
        "decode": decode_model(dims.decoder, half, rotary, prune_layers=(2,)),
        "visual": llava15.vision_model(dims.vision, half),
    }
    for name, model in models.items():
        path = shipped("graphs") / "goldens" / "small-llava15" / f"{name}.onnxtxt"
        text = ir.to_onnx_text(model, exclude_initializers=True) + "\n"
        if request.config.getoption("--update-goldens"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert text == Path(path).read_text(encoding="utf-8"), f"{path} differs: pytest --update-goldens if meant"
