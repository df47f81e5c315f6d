"""LLaVA-1.5 against transformers: tensor names, vision tower, prompts, and eager CAPA."""

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
from transformers import LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from capa_export.base.errors import CapaError
from capa_export.base.toml import shipped
from capa_export.export.graphs import write_onnx
from capa_export.graph.decoder import decode_model, prefill_model
from capa_export.graph.rotary import rotary_tables
from capa_export.model.checkpoint import open_checkpoint
from capa_export.model.families import llava15
from capa_export.model.prompt import Picture, Prompter
from capa_export.model.source import Source
from capa_export.model.tensors import check_tensors
from capa_export.plan.flops import parameters
from capa_export.run.onnx import OnnxModel
from tests.agreement import compare
from tests.conftest import noise
from tests.models.llava15 import PATCH, SIDE, TEMPLATE, build_image_processor, build_tokenizer, random_model, save_model


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
