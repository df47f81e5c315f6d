"""Qwen3-VL against transformers: tensor names, vision tower, prompts, DeepStack, and eager CAPA."""

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
from transformers import Qwen3VLProcessor

from benchmarks.tiny.tiny_qwen25vl import build_tokenizer
from capa_export.base.errors import CapaError
from capa_export.base.toml import shipped
from capa_export.bundle.store import Bundle
from capa_export.config.recipe import Recipe, load_recipe
from capa_export.data.conversation import conversations
from capa_export.export.graphs import write_onnx
from capa_export.graph.decoder import decode_model, prefill_model
from capa_export.graph.rotary import rotary_tables
from capa_export.model.checkpoint import open_checkpoint
from capa_export.model.eager import Eager
from capa_export.model.eager_plan import EagerPlan
from capa_export.model.families import qwen3vl
from capa_export.model.generation import GenerationOptions
from capa_export.model.prompt import Picture, Prompt, Prompter
from capa_export.model.source import Source
from capa_export.model.tensors import check_tensors
from capa_export.plan.flops import flops, parameters
from capa_export.run.onnx import OnnxModel
from tests.agreement import compare
from tests.building import Building, answer
from tests.conftest import noise
from tests.graph.counting import graph_flops
from tests.models.qwen3vl import build_image_processor, random_model, save_model
from tests.targets import one_gpu

VALUES = 3 * 2 * 16 * 16


@pytest.fixture(scope="module")
def model() -> Any:
    return random_model()


@pytest.fixture(scope="module")
def checkpoint(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("checkpoint"), model)


@pytest.fixture(scope="module")
def source(checkpoint: Path) -> Source:
    return Source.of(open_checkpoint(str(checkpoint)), qwen3vl)


@pytest.fixture(scope="module")
def prompter(checkpoint: Path, source: Source) -> Prompter:
    return Prompter(checkpoint, checkpoint, qwen3vl, source.dims)


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("qwen3_vl_moe", "model_type is 'qwen3_vl_moe', a mixture of experts"),
        ("qwen2_5_vl", "model_type is 'qwen2_5_vl', this recipe is for 'qwen3_vl'"),
        (None, "model_type is None, this recipe is for 'qwen3_vl'"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(source: Source, model_type: str | None, message: str) -> None:
    config = {**source.checkpoint.config, "model_type": model_type}
    with pytest.raises(CapaError, match=message):
        Source.of(replace(source.checkpoint, config=config), qwen3vl)


# Tensor names.


def as_saved_by_5(model: Any, folder: Path) -> None:
    model.save_pretrained(folder, save_original_format=False)


def with_the_parts_outermost(_: Any, folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    names = {"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head."}
    names["model.visual."] = "visual."
    renamed = {
        next((new + name[len(old) :] for old, new in names.items() if name.startswith(old)), name): tensor
        for name, tensor in tensors.items()
    }
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})


def in_shards(model: Any, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")


LAYOUTS = {
    "transformers 5": (as_saved_by_5, "model.visual.merger.norm.weight"),
    "parts outermost": (with_the_parts_outermost, "visual.merger.norm.weight"),
    "shards": (in_shards, "model.visual.merger.norm.weight"),
}
FILES = ("visual/model.onnx.data", "llm/model.onnx.data", "llm/embedding.safetensors")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_every_layout_gives_the_same_files(tmp_path: Path, layout: str, *, tied: bool) -> None:
    model = random_model(2, tie_word_embeddings=tied)
    plain = save_model(tmp_path / "plain", model)
    relay, name = LAYOUTS[layout]
    other = Path(shutil.copytree(plain, tmp_path / "other"))
    relay(model, other)
    for folder in (plain, other):
        found = open_checkpoint(str(folder))
        source = Source.of(found, qwen3vl)
        assert source.dims.decoder.tie_word_embeddings is tied
        check_tensors(source)
        write_onnx(source, "fp32", tmp_path / f"{folder.name} onnx", prune_layers=(2,), scales={})
    assert name in open_checkpoint(str(other)).tensors
    for file in FILES:
        assert (tmp_path / "plain onnx" / file).read_bytes() == (tmp_path / "other onnx" / file).read_bytes()


def test_a_tensor_from_elsewhere_is_refused(source: Source) -> None:
    # Tensors are told apart by where they lie.
    spare = replace(next(iter(source.tensors.values())), offset=0)
    name = "visual.deepstack_merger_list.3.norm.weight"
    with pytest.raises(CapaError, match=f"tensor {name} has no place in Qwen3VLForConditionalGeneration"):
        check_tensors(replace(source, tensors={**source.tensors, name: spare}))
    rest = {name: tensor for name, tensor in source.tensors.items() if name != "model.layers.1.self_attn.k_norm.weight"}
    with pytest.raises(CapaError, match=r"tensor model.layers.1.self_attn.k_norm.weight is missing"):
        check_tensors(replace(source, tensors=rest))


# Vision tower.

GRIDS = [(1, 16, 16), (1, 10, 14), (1, 2, 2), (3, 8, 8), (2, 6, 30), (1, 40, 4), (1, 2, 38), (1, 14, 14)]


def compare_vision(model: Any, onnx: OnnxModel, grid: tuple[int, int, int], tolerance: float) -> None:
    frames, rows, cols = grid
    merge = model.config.vision_config.spatial_merge_size
    patches = torch.randn(frames * rows * cols, VALUES, generator=torch.Generator().manual_seed(rows))
    with torch.no_grad():
        seen = model.model.get_image_features(patches, torch.tensor([grid]))
    expected = torch.cat(list(seen.pooler_output)).numpy()
    shape = (frames, rows // merge, cols // merge, merge * merge, VALUES)
    found = onnx.features(Picture(patches.numpy().reshape(shape), len(expected)))
    np.testing.assert_allclose(found["image_features"], expected, atol=tolerance * np.abs(expected).max(), rtol=0)
    assert len(found.get("deepstack_features", ())) == len(seen.deepstack_features)
    for ours, theirs in zip(found.get("deepstack_features", ()), seen.deepstack_features, strict=True):
        wanted = torch.cat(list(theirs)).numpy()
        np.testing.assert_allclose(ours, wanted, atol=tolerance * np.abs(wanted).max(), rtol=0)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_vision_tower_equals_transformers(model: Any, built: "Build", grid: tuple[int, int, int]) -> None:
    compare_vision(model, built(), grid, 1e-5)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_vision_tower_stays_close_in_lower_precision(model: Any, built: "Build", precision: str) -> None:
    # 1e-2 and 5e-2: half has 11 bits and bf16 weights 8, and errors of four blocks add up.
    compare_vision(model, built(precision=precision), (1, 10, 14), {"fp16": 1e-2, "bf16": 5e-2}[precision])


VARIANTS = {
    "no DeepStack": {"deepstack_visual_indexes": []},
    "units of one patch": {"spatial_merge_size": 1},
    "as many layers as the decoder": {"depth": 5, "deepstack_visual_indexes": [0, 1, 2, 3, 4]},
}


@pytest.mark.parametrize("vision", VARIANTS.values(), ids=VARIANTS)
def test_variants_equal_transformers(tmp_path: Path, vision: dict[str, Any]) -> None:
    model = random_model(3, vision=vision)
    folder = save_model(tmp_path / "checkpoint", model)
    source = Source.of(open_checkpoint(str(folder)), qwen3vl)
    check_tensors(source)
    assert parameters(source.dims).total == model.num_parameters()
    write_onnx(source, "fp32", tmp_path / "onnx", prune_layers=(2,), scales=SCALES)
    onnx = OnnxModel(tmp_path / "onnx", threads=1)
    for grid in ((1, 6, 10), (1, 1, 5)) if "spatial_merge_size" in vision else ((1, 6, 10),):
        compare_vision(model, onnx, grid, 1e-5)
    if "spatial_merge_size" not in vision:
        prompt = Prompter(folder, folder, qwen3vl, source.dims)("what color is the star ?", [noise(160, 96)])
        compare(qwen3vl, model, onnx, prompt, {2: 4}, SCALES, 1e-5)


# Prompts.

PICTURES = {"one": [noise(224, 112)], "two": [noise(64, 96), noise(160, 320)], "one token": [noise(32, 32)], "none": []}


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> Qwen3VLProcessor:
    """transformers' own processor, without the video processor that needs torchvision."""
    monkeypatch.setattr(Qwen3VLProcessor, "check_argument_for_proper_class", lambda *_: None)
    tokenizer = build_tokenizer()
    return Qwen3VLProcessor(build_image_processor(), tokenizer, None, chat_template=tokenizer.chat_template)


def whole(processor: Any, prompt: Prompt, pictures: list[Any]) -> dict[str, torch.Tensor]:
    """The prompt as the model's own forward takes it."""
    given = {"input_ids": torch.from_numpy(prompt.input_ids)[None]}
    if not pictures:
        return given
    kinds = torch.from_numpy(prompt.is_visual)[None].int()
    return {**given, **processor.image_processor(images=pictures, return_tensors="pt"), "mm_token_type_ids": kinds}


@pytest.mark.parametrize("pictures", PICTURES.values(), ids=PICTURES)
def test_prompts_equal_those_of_the_processor(prompter: Prompter, processor: Any, pictures: list[Any]) -> None:
    content = [{"type": "image"} for _ in pictures] + [{"type": "text", "text": "what color is the star ?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    expected = processor(images=pictures or None, text=[text], return_tensors="np")
    prompt = prompter("what color is the star ?", pictures)
    np.testing.assert_array_equal(prompt.input_ids, expected["input_ids"][0])
    if pictures:
        patches = np.concatenate([picture.patches.reshape(-1, VALUES) for picture in prompt.pictures])
        np.testing.assert_array_equal(patches, expected["pixel_values"])


@pytest.mark.parametrize("pictures", PICTURES.values(), ids=PICTURES)
def test_eager_inputs_are_those_of_the_models_own_forward(
    model: Any, prompter: Prompter, processor: Any, pictures: list[Any]
) -> None:
    prompt = prompter("what color is the star ?", pictures)
    is_visual = torch.from_numpy(prompt.is_visual)
    inputs = qwen3vl.eager_inputs(model, prompt)
    np.testing.assert_array_equal(prompt.position_ids, inputs.position_ids[:, 0].numpy())
    assert prompt.next_position == int(inputs.position_ids.max()) + 1
    assert [len(features) for features in inputs.deepstack] == [prompt.num_visual] * (3 if pictures else 0)
    with torch.no_grad():
        expected = model(**whole(processor, prompt, pictures)).logits
        hidden = model.model.language_model(**inputs.arguments(is_visual)).last_hidden_state
        by_hand = Eager(model).prefill(inputs, is_visual, EagerPlan()).logits
    torch.testing.assert_close(model.lm_head(hidden), expected, rtol=0, atol=0)
    # 1e-5: the whole prompt's head multiplies in another order than the last row's.
    torch.testing.assert_close(by_hand, expected[0, -1], rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_patches_of_another_size_are_refused(checkpoint: Path, source: Source, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"patch_size": 14}))
    with pytest.raises(CapaError, match=r"preprocessor_config.json makes patches of 1176 numbers, .* implies 1536"):
        Prompter(folder, folder, qwen3vl, source.dims)("what ?", [noise(56, 56)])


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


# DeepStack adds behind layers 0, 1 and 2.
SCHEDULES = {"before all": (0,), "between": (1,), "at the last": (2,), "behind": (3,), "several": (0, 1, 3)}


@pytest.mark.parametrize("pictures", PICTURES.values(), ids=PICTURES)
@pytest.mark.parametrize("layers", SCHEDULES.values(), ids=SCHEDULES)
def test_fp32_equals_eager_capa(
    model: Any, prompter: Prompter, built: Build, layers: tuple[int, ...], pictures: list[Any]
) -> None:
    prompt = prompter("what color is the star ?", pictures)
    keep = {
        layer: min(prompt.num_visual, max(len(pictures), prompt.num_visual // (2 * stage)))
        for stage, layer in enumerate(layers, 1)
    }
    # 1e-5: FP32 sums in another order, over at most 70 tokens.
    compare(qwen3vl, model, built(layers), prompt, keep, SCALES, 1e-5)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("pictures", PICTURES.values(), ids=PICTURES)
def test_lower_precision_stays_close(
    model: Any, prompter: Prompter, built: Build, pictures: list[Any], precision: str
) -> None:
    prompt = prompter("what color is the star ?", pictures)
    # Everything kept, as a flip at the cut is no matter of precision. 1e-2 and 8e-2: half has 11 bits and bf16
    # weights 8, and errors of five layers add up.
    compare(
        qwen3vl,
        model,
        built(precision=precision),
        prompt,
        {2: prompt.num_visual},
        SCALES,
        {"fp16": 1e-2, "bf16": 8e-2}[precision],
    )


@pytest.mark.parametrize("pictures", PICTURES.values(), ids=PICTURES)
def test_without_pruning_or_scales_it_is_the_dense_model(
    model: Any, prompter: Prompter, processor: Any, built: Build, pictures: list[Any]
) -> None:
    prompt = prompter("what color is the star ?", pictures)
    run = built(scales={}).prefill(prompt, [prompt.num_visual])
    logits, cache = run.logits, run.cache
    with torch.no_grad():
        output = model(**whole(processor, prompt, pictures), use_cache=True)
        for step in range(4):
            dense = output.logits[0, -1].numpy()
            np.testing.assert_allclose(logits, dense, atol=1e-5 * np.abs(dense).max(), rtol=0)
            token, position = int(dense.argmax()), prompt.next_position + step
            logits, cache = built(scales={}).step(cache, token, position)
            output = model(
                input_ids=torch.tensor([[token]]),
                position_ids=torch.full((3, 1, 1), position),
                past_key_values=output.past_key_values,
                use_cache=True,
            )


def test_deepstack_reaches_the_answer(prompter: Prompter, built: Build) -> None:
    """A prefill that ignores the features of one layer would pass where they are small."""
    prompt = prompter("what color is the star ?", [noise(224, 112)])
    embeds = built().embed(prompt)
    whole = built().prefill(prompt, [prompt.num_visual], embeds).logits
    assert not embeds["deepstack_embeds"][:, ~prompt.is_visual].any()
    for layer in range(3):
        without = embeds["deepstack_embeds"].copy()
        without[layer] = 0
        changed = built().prefill(prompt, [prompt.num_visual], {**embeds, "deepstack_embeds": without}).logits
        assert np.abs(changed - whole).max() > 1e-2 * np.abs(whole).max(), layer


def test_flops_are_those_of_the_exported_graphs(source: Source, prompter: Prompter, built: Build) -> None:
    prompt, onnx, decoder = prompter("", [noise(224, 224)]), built(scales={}), source.dims.decoder
    pixels = {"pixel_values": prompt.pictures[0].patches}
    seen = graph_flops(onnx.folder / "visual" / "model.onnx", pixels)
    assert sum(seen.values()) == source.dims.vision.flops(prompt.num_visual)
    feed = {"position_ids": prompt.position_ids, "text_positions": prompt.text_positions, "num_keep": np.array([9])}
    counted = graph_flops(onnx.folder / "llm" / "prefill.onnx", {**onnx.embed(prompt), **feed})
    sizes = {"num_visual": prompt.num_visual, "num_text": len(prompt.text_positions)}
    planned = flops(decoder, **sizes, schedule=[(2, 9)], linear_layers=()).capa
    # The values are weighted by a vector, which is no matrix product.
    weighting = len(prompt.input_ids) * decoder.num_heads * decoder.head_dim
    assert sum(counted.values()) == planned.total - weighting


# The whole way.


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    """The shipped one, made small; random weights are linear nowhere near 0.96."""
    data = load_recipe("qwen3vl").model_dump()
    assert [stage["layer"] for stage in data["prune"]["schedule"]] == [3]
    data["prune"]["schedule"] = [{"layer": 1, "ratio": 0.75}]
    data["ffn"] = {"eta": 0.5, "budget": 100}
    data["parity"] |= {"prompts": 2, "steps": 3, "accuracy_samples": 2}
    return Recipe(**data)


@pytest.mark.parametrize(
    ("precision", "weights"),
    # Engines of FP16 with its weights in them are built of every family by the tests of `lower`.
    [pytest.param("fp16", "embedded", marks=pytest.mark.exhaustive), ("bf16", "external")],
)
def test_a_bundle_is_built_with_its_engines_and_answers(
    recipe: Recipe, checkpoint: Path, tmp_path: Path, precision: Any, weights: Any
) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for index, size in enumerate(((224, 224), (160, 96))):
        noise(*size, index).save(pictures / f"{index}.png")
    building = Building.of(
        recipe, Bundle(tmp_path / "out"), checkpoint, images=pictures, precision=precision, weights=weights
    )
    report = building.build(one_gpu())
    assert report.passed, report.failures
    assert set(building.bundle.stage("engine/rtx")["result"]["engines"]) == {
        "visual/visual",
        "llm/prefill",
        "llm/decode",
    }
    [said] = answer(
        building.bundle,
        conversations("what color is the star ?", [pictures / "1.png"]),
        options=GenerationOptions(max_new_tokens=3),
    )
    assert said["stages"] == [{"layer": 1, "where": "after layer 1", "kept": 4, "visual": 15}]


def test_goldens(request: pytest.FixtureRequest, source: Source) -> None:
    """The graphs of the small model, as text without weights: they change only on purpose."""
    dims, half = source.dims, ir.DataType.FLOAT16
    rotary = rotary_tables(dims)
    models = {
        "prefill": prefill_model(dims.decoder, half, rotary, prune_layers=(1,), linear_layers=(3,)),
        "decode": decode_model(dims.decoder, half, rotary, prune_layers=(1,)),
        "visual": qwen3vl.vision_model(dims.vision, half),
    }
    for name, model in models.items():
        path = shipped("graphs") / "goldens" / "small-qwen3vl" / f"{name}.onnxtxt"
        text = ir.to_onnx_text(model, exclude_initializers=True) + "\n"
        if request.config.getoption("--update-goldens"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert text == Path(path).read_text(encoding="utf-8"), f"{path} differs: pytest --update-goldens if meant"
