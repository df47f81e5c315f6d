"""Pictures come out as transformers' own image processors make them, bit for bit, whatever the settings."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import SiglipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from capa_export.model.processors.resolved import read_processors, write_processors
from tests.conftest import noise
from tests.models.qwen25vl import build_tokenizer

SIZES = [(1, 1), (56, 56), (57, 83), (200, 31), (3, 400), (640, 480), (333, 777), (28, 1500)]
KINDS: dict[str, tuple[Any, list[dict[str, Any]]]] = {
    "patches": (
        Qwen2VLImageProcessorPil,
        [
            {},
            {"min_pixels": 784, "max_pixels": 3136},
            {"size": {"shortest_edge": 3136, "longest_edge": 12544}, "patch_size": 16},
            {"do_resize": False},
            {"merge_size": 1, "temporal_patch_size": 1, "resample": 2},
            {"do_rescale": False, "do_normalize": False},
            {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.25, 1.0], "rescale_factor": 0.5},
            {"do_rescale": False},
            {"do_normalize": False},
        ],
    ),
    "tiles": (
        GotOcr2ImageProcessorPil,
        [
            {},
            {"crop_to_patches": True, "size": 28},
            {"crop_to_patches": True, "size": {"height": 28, "width": 56}, "min_patches": 2, "max_patches": 7},
            {"crop_to_patches": True, "max_patches": 1, "size": [20, 30]},
            {"crop_to_patches": True, "size": {"height": 64, "width": 64}, "do_resize": False, "do_normalize": False},
            {"size": {"shortest_edge": 28}},
        ],
    ),
    "plain": (
        CLIPImageProcessorPil,
        [
            {},
            {"size": 56, "crop_size": 56},
            {"size": {"shortest_edge": 57}, "crop_size": {"height": 70, "width": 41}},
            {"size": {"shortest_edge": 60, "longest_edge": 90}, "crop_size": {"height": 64, "width": 64}},
            {"size": {"height": 40, "width": 50}, "do_center_crop": False},
            {"size": {"max_height": 40, "max_width": 50}, "do_center_crop": False},
            {"size": [40, 50], "crop_size": [41, 51]},
            {"do_resize": False, "crop_size": {"height": 101, "width": 100}},
            {"size": {"height": 30, "width": 30}, "do_center_crop": False, "do_pad": True, "pad_size": 37},
            {"do_center_crop": False, "do_pad": True, "pad_size": {"height": 999, "width": 999}, "size": 8},
            {"do_rescale": False, "resample": 0},
            {"image_mean": 0.5, "image_std": 0.25},
            {"use_square_size": True},
        ],
    ),
    "squared": (
        LlavaImageProcessorPil,
        [
            {},
            {"do_pad": True},
            {"do_pad": True, "size": {"height": 56, "width": 56}, "do_center_crop": False},
            {"do_pad": True, "do_resize": False, "do_center_crop": False, "image_mean": [0.1, 0.2, 0.999]},
        ],
    ),
}
CASES = [(kind, settings) for kind, (_, cases) in KINDS.items() for settings in cases]


def pictures() -> list[Image.Image]:
    grey, see_through = noise(60, 40).convert("L"), noise(61, 43).convert("RGBA")
    see_through.putalpha(noise(61, 43, seed=1).convert("L"))
    keyed = noise(50, 50).convert("RGB")
    keyed.info["transparency"] = keyed.getpixel((3, 4))
    palette = noise(50, 64).convert("P")
    palette.info["transparency"] = 7
    return [*(noise(*size) for size in SIZES), grey, see_through, keyed, palette, noise(44, 44).convert("CMYK")]


def kept(image_processor: Any, folder: Path) -> Any:
    assert write_processors(build_tokenizer(), image_processor, folder) is None
    processors = read_processors(folder)
    assert processors is not None
    return processors.image_processor


def outcome(image_processor: Any, images: list[Image.Image], **options: Any) -> Any:
    try:
        return dict(image_processor(images=images, return_tensors="np", **options))
    except ValueError:
        return None


def assert_same(own: Any, theirs: Any) -> None:
    if theirs is None:
        assert own is None
        return
    assert own.keys() == theirs.keys()
    for name, array in theirs.items():
        assert own[name].dtype == array.dtype
        np.testing.assert_array_equal(own[name], array, strict=True)


@pytest.mark.parametrize(("kind", "settings"), CASES, ids=[f"{kind}-{settings}" for kind, settings in CASES])
def test_every_bit_is_transformers(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    theirs = KINDS[kind][0](**settings)
    own = kept(theirs, tmp_path)
    made = 0
    for image in pictures():
        expected = outcome(theirs, [image])
        made += expected is not None
        assert_same(outcome(own, [image]), expected)
    assert made


def test_what_transformers_refuses_is_refused(tmp_path: Path) -> None:
    for theirs in (
        Qwen2VLImageProcessorPil(size={"min_pixels": 784, "max_pixels": 3136}),
        GotOcr2ImageProcessorPil(size={"shortest_edge": 28}, crop_to_patches=True),
        CLIPImageProcessorPil(image_mean=[0.5, 0.5]),
    ):
        own = kept(theirs, tmp_path)
        for image_processor in (theirs, own):
            with pytest.raises((ValueError, TypeError)):
                image_processor(images=[noise(60, 60)], return_tensors="np")


def test_several_pictures_at_once_and_settings_for_one_call(tmp_path: Path) -> None:
    theirs = Qwen2VLImageProcessorPil()
    own = kept(theirs, tmp_path)
    frames = [noise(100, 80, seed) for seed in range(3)]
    for options in ({}, {"size": {"shortest_edge": 784, "longest_edge": 1568}, "do_normalize": False, "resample": 2}):
        assert_same(outcome(own, frames, **options), outcome(theirs, frames, **options))
    tiles = GotOcr2ImageProcessorPil(size=28)
    assert_same(
        outcome(kept(tiles, tmp_path), frames, crop_to_patches=True), outcome(tiles, frames, crop_to_patches=True)
    )
    plain: Any = CLIPImageProcessorPil(do_center_crop=False, do_resize=False, do_pad=True)
    mixed = [noise(30, 20), noise(20, 31)]
    plain.pad_size = None
    assert_same(outcome(kept(plain, tmp_path), mixed), outcome(plain, mixed))


def test_settings_have_their_names(tmp_path: Path) -> None:
    theirs = CLIPImageProcessorPil(size=30, crop_size=28, do_resize=False)
    own = kept(theirs, tmp_path)
    for name in ("do_resize", "resample", "image_mean", "image_std", "rescale_factor", "do_center_crop", "do_pad"):
        assert getattr(own, name) == getattr(theirs, name)
    assert own.size == dict(theirs.size) and own.crop_size == dict(theirs.crop_size)
    assert not hasattr(own, "no_such_setting")


@pytest.mark.parametrize(
    "unknown",
    [
        SiglipImageProcessorPil(),
        Qwen2VLImageProcessorPil(do_convert_rgb=False),
        type("Own", (CLIPImageProcessorPil,), {})(),
    ],
    ids=["another class", "colours as they are", "a class of one's own"],
)
def test_an_image_processor_not_known_here_is_left_to_transformers(unknown: Any, tmp_path: Path) -> None:
    reason = write_processors(build_tokenizer(), unknown, tmp_path)
    assert reason is not None and type(unknown).__name__ in reason
    assert read_processors(tmp_path) is None and not list(tmp_path.iterdir())
