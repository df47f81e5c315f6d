"""Videos for Qwen2.5-VL against transformers: patches, features, positions, and whole prompts."""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_utils import SizeDict

from capa_export.base.errors import CapaError, ExitCode
from capa_export.config.pixels import PixelBounds
from capa_export.export.graphs import write_onnx
from capa_export.model.eager import Eager
from capa_export.model.eager_plan import EagerInputs, EagerPlan
from capa_export.model.families import qwen25vl
from capa_export.model.families.qwen25vl.video import video as picture_from_video
from capa_export.model.prompt import Prompt, Prompter, Turn, Video
from capa_export.model.source import Source
from capa_export.run.onnx import OnnxModel
from tests.conftest import noise

QUESTION = "what color is the star ?"


def frames(count: int, width: int, height: int) -> list[Image.Image]:
    return [noise(width, height, seed) for seed in range(count)]


CONTENTS: dict[str, list[Any]] = {
    "six frames": [Video(frames(6, 196, 140), 2.0), QUESTION],
    "odd": [Video(frames(5, 112, 168), 2.0), QUESTION],
    "one frame": [Video(frames(1, 112, 168), 2.0), QUESTION],
    "time past the sides": [Video(frames(8, 112, 112), 0.3), QUESTION],
    "steps that are no whole number": [Video(frames(8, 112, 112), 29.97), QUESTION],
    "between pictures": [noise(84, 56, 7), Video(frames(4, 140, 112), 1.5), "and", noise(56, 112, 8), QUESTION],
    "two": [Video(frames(4, 140, 112), 1.5), "the star", Video(frames(6, 84, 112), 5.0), QUESTION],
}


@pytest.fixture(scope="module")
def onnx(source: Source, tmp_path_factory: pytest.TempPathFactory) -> OnnxModel:
    folder = tmp_path_factory.mktemp("onnx")
    write_onnx(source, "fp32", folder, prune_layers=(2,), scales={})
    return OnnxModel(folder, threads=1)


@pytest.fixture(scope="module")
def prompts(prompter: Prompter) -> Callable[[str], Prompt]:
    return lambda name: prompter.chat([Turn("user", CONTENTS[name])])


@pytest.mark.parametrize("name", CONTENTS)
def test_a_prompt_equals_eager_capa(model: Any, onnx: OnnxModel, prompts: Callable[[str], Prompt], name: str) -> None:
    prompt = prompts(name)
    with torch.no_grad():
        embeds, position_ids = qwen25vl.eager_inputs(model, prompt)
    np.testing.assert_array_equal(prompt.position_ids, position_ids[:, 0].numpy())
    assert prompt.next_position == int(position_ids.max()) + 1
    # FP32 sums in another order.
    largest = float(embeds.abs().max())
    np.testing.assert_allclose(onnx.embed(prompt)["inputs_embeds"], embeds.numpy(), rtol=0, atol=1e-5 * largest)
    keep = -(-prompt.num_visual // 4)
    plan = EagerPlan({2: keep}, min_keep_per_image=1)
    eager = Eager(model)
    expected = eager.prefill(EagerInputs(embeds, position_ids), torch.from_numpy(prompt.is_visual), plan)
    run = onnx.prefill(prompt, [keep])
    np.testing.assert_array_equal(run.kept[0], expected.kept[2].numpy())
    logits, wanted, cache = run.logits, expected.logits, run.cache
    for step in range(4):
        np.testing.assert_allclose(logits, wanted.numpy(), rtol=0, atol=1e-5 * float(wanted.abs().max()))
        token = int(wanted.argmax())
        wanted = eager.step(expected, token, prompt.next_position + step)
        logits, cache = onnx.step(cache, token, prompt.next_position + step)


@pytest.mark.parametrize("name", CONTENTS)
def test_eager_inputs_are_those_of_the_models_own_forward(
    model: Any, prompts: Callable[[str], Prompt], name: str
) -> None:
    prompt = prompts(name)
    ids = torch.from_numpy(prompt.input_ids)[None]
    kinds = (ids == model.config.image_token_id).int() + 2 * (ids == model.config.video_token_id).int()
    videos = [picture for picture in prompt.pictures if picture.frame_seconds is not None]
    stills = [picture for picture in prompt.pictures if picture.frame_seconds is None]
    given: dict[str, Any] = {"second_per_grid_ts": torch.tensor([2 / video.fps for video in shown_videos(name)])}
    given["pixel_values_videos"], given["video_grid_thw"] = qwen25vl.tower_inputs(model, videos)
    if stills:
        given["pixel_values"], given["image_grid_thw"] = qwen25vl.tower_inputs(model, stills)
    with torch.no_grad():
        whole = model(input_ids=ids, mm_token_type_ids=kinds, **given).logits
        embeds, position_ids = qwen25vl.eager_inputs(model, prompt)
        torch.testing.assert_close(model(inputs_embeds=embeds, position_ids=position_ids).logits, whole)


def shown_videos(name: str) -> list[Video]:
    return [part for part in CONTENTS[name] if isinstance(part, Video)]


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """transformers' video processor; torchvision, which it wants for resizing alone, is not there."""
    parent = None
    for name in ("torchvision", "transforms", "v2", "functional"):
        module = ModuleType(name if parent is None else f"{parent.__name__}.{name}")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        if parent is not None:
            vars(parent)[name] = module
        parent = module
    vars(parent)["InterpolationMode"] = object
    before = set(sys.modules)
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    yield Qwen2VLVideoProcessor
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.mark.parametrize("count", [1, 5, 6])
def test_patches_are_those_of_transformers(
    source: Source, prompter: Prompter, checkpoint: Path, reference: Any, count: int
) -> None:
    """On frames whose sides need no resizing, which is PIL's here and torchvision's there."""
    shown = frames(count, 140, 196)
    picture = picture_from_video(Video(shown, 2.0), prompter.image_processor, checkpoint, PixelBounds(), source.dims)
    pixels = np.stack([np.asarray(frame, dtype=np.float32).transpose(2, 0, 1) / 255 for frame in shown])
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (reference.image_mean, reference.image_std))
    videos = torch.from_numpy((pixels - mean) / std)[None]
    patches, *grid = reference.patchify(None, videos, patch_size=14, merge_size=2, temporal_patch_size=2)
    assert grid == [-(-count // 2), 14, 10]
    # Rescaling and normalising in one step or two.
    np.testing.assert_allclose(picture.patches.reshape(patches[0].shape), patches[0].numpy(), rtol=0, atol=1e-6)


SMALL, MIDDLE, LARGE = ({"size": {"shortest_edge": 3136, "longest_edge": side * side}} for side in (112, 224, 448))
FILES: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "published": ({"preprocessor_config.json": {"min_pixels": 3136, "max_pixels": 50176}}, (3, 17)),
    "own file": ({"preprocessor_config.json": MIDDLE, "video_preprocessor_config.json": SMALL}, (1, 8)),
    "transformers 5": (
        {"video_preprocessor_config.json": SMALL, "processor_config.json": {"video_processor": LARGE}},
        (6, 30),
    ),
    "capped": (
        {"video_preprocessor_config.json": {**LARGE, "cap_pixels_per_frame": True, "max_video_tokens": 100}},
        (2, 12),
    ),
    "floating-point": (
        {"video_preprocessor_config.json": {"size": {"shortest_edge": 3136.0, "longest_edge": 12544.0}}},
        (1, 8),
    ),
    "nothing": ({}, (6, 30)),
}


@pytest.mark.parametrize("name", FILES)
def test_the_limits_of_frames_come_from_where_transformers_finds_them(
    source: Source,
    prompter: Prompter,
    reference: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    files, sides = FILES[name]
    for file, content in files.items():
        (tmp_path / file).write_text(json.dumps(content), encoding="utf-8")
    shown = Video(frames(6, 840, 168), 2.0)
    picture = picture_from_video(shown, prompter.image_processor, tmp_path, PixelBounds(), source.dims)
    assert picture.patches.shape[:3] == (3, *sides)
    processor = reference.from_pretrained(tmp_path, local_files_only=True) if files else reference()
    monkeypatch.setattr(reference.__mro__[1], "resize", lambda _self, image, size, resample: size)
    size = processor.resize(
        videos=torch.zeros(1, 6, 3, 168, 840),
        size=SizeDict(**dict(processor.size)),
        resample=3,
        factor=28,
        cap_pixels_per_frame=processor.cap_pixels_per_frame,
    )
    assert (size.height // 28, size.width // 28) == sides


BOUNDED: list[tuple[dict[str, int], tuple[int, int]]] = [
    ({}, (6, 30)),
    ({"max_pixels": 12_544}, (1, 8)),
    ({"min_pixels": 300_000}, (9, 44)),
    ({"min_pixels": 300_000, "max_pixels": 320_000}, (9, 44)),
    ({"max_rows": 64, "max_cols": 10}, (2, 10)),
    ({"max_pixels": 50_176, "max_rows": 64, "max_cols": 10}, (2, 10)),
]


@pytest.mark.parametrize(("given", "sides"), BOUNDED)
def test_frames_stay_within_the_bounds_of_pictures(
    source: Source, checkpoint: Path, given: dict[str, int], sides: tuple[int, int]
) -> None:
    prompter = Prompter(checkpoint, checkpoint, qwen25vl, source.dims, bounds=PixelBounds(**given))
    [picture] = prompter.chat([Turn("user", [Video(frames(6, 840, 168), 2.0), QUESTION])]).pictures
    assert picture.patches.shape[:3] == (3, *sides)


def test_a_budget_for_a_video_holds_beside_the_users_bounds(source: Source, prompter: Prompter, tmp_path: Path) -> None:
    capped = {**LARGE, "cap_pixels_per_frame": True, "max_video_tokens": 100}
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(capped), encoding="utf-8")

    def sides(**given: int) -> tuple[int, ...]:
        video, bounds = Video(frames(6, 840, 168), 2.0), PixelBounds(**given)
        return picture_from_video(video, prompter.image_processor, tmp_path, bounds, source.dims).patches.shape[1:3]

    assert sides() == sides(max_pixels=400_000) == (2, 12)
    assert sides(max_pixels=12_544) == (1, 8)


def test_bounds_that_no_frame_can_keep_are_refused(source: Source, prompter: Prompter, tmp_path: Path) -> None:
    def ask(**given: int) -> None:
        video = Video(frames(2, 56, 56), 2.0)
        picture_from_video(video, prompter.image_processor, tmp_path, PixelBounds(**given), source.dims)

    with pytest.raises(
        CapaError, match="--min-pixels 700000: this model sees at most 602112 pixels; give --max-pixels"
    ) as caught:
        ask(min_pixels=700_000)
    assert caught.value.code == ExitCode.USAGE
    (tmp_path / "video_preprocessor_config.json").write_text('{"do_resize": false}', encoding="utf-8")
    with pytest.raises(CapaError, match="--max-pixels 9999: this model's image processor does not resize"):
        ask(max_pixels=9999)


def test_a_tokenizer_without_the_token_takes_no_video(source: Source, prompter: Prompter, checkpoint: Path) -> None:
    dims = replace(source.dims, vision=replace(source.dims.vision, video_token_id=10**6))
    other = Prompter(checkpoint, checkpoint, qwen25vl, dims)
    np.testing.assert_array_equal(other(QUESTION, []).input_ids, prompter(QUESTION, []).input_ids)
    with pytest.raises(CapaError, match="Qwen2_5_VLForConditionalGeneration takes no video"):
        other.chat([Turn("user", CONTENTS["odd"])])


def test_what_no_frame_may_be_is_one_line(prompter: Prompter, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CapaError, match="refuses a video of 600 x 2 pixels: absolute aspect ratio"):
        prompter.chat([Turn("user", [Video(frames(2, 600, 2), 2.0), QUESTION])])
    (tmp_path / "video_preprocessor_config.json").write_text('{"size": {"shortest_edge": "x"}}')
    broken = Prompter(checkpoint, checkpoint, qwen25vl, prompter.dims)
    broken.folder = tmp_path
    with pytest.raises(
        CapaError, match=r"video_preprocessor_config\.json: size\.shortest_edge: must be a whole number"
    ):
        broken.chat([Turn("user", [Video(frames(2, 56, 56), 2.0), QUESTION])])
    (tmp_path / "video_preprocessor_config.json").write_text("{")
    with pytest.raises(CapaError, match=r"video_preprocessor_config\.json: is no JSON"):
        broken.chat([Turn("user", [Video(frames(2, 56, 56), 2.0), QUESTION])])
