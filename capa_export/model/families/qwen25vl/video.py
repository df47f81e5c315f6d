"""Videos for Qwen2.5-VL, by the image processor: transformers' own video processor needs torchvision.

F = frames, P = frames that share a patch, N = patches of a frame, C = channels.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from capa_export.base.dims import ModelDims, Section
from capa_export.base.errors import CapaError
from capa_export.config.pixels import PixelBounds, whole_numbers
from capa_export.model.families.qwen25vl.dims import VisionDims
from capa_export.model.families.qwen25vl.pixels import check_bounds, picture_options, pixel_area
from capa_export.model.prompt import Picture, Video

__all__ = ["video"]

_FILES = ("video_preprocessor_config.json", "preprocessor_config.json")
_MIN_PIXELS, _MAX_PIXELS = 128 * 28 * 28, 768 * 28 * 28
_MAX_VIDEO_TOKENS = 128_000
"""Defaults of transformers, as the two above, for what no file says."""
_SHARED = ("do_resize", "do_rescale", "do_normalize", "image_mean", "image_std", "resample", "rescale_factor")


def video(
    video: Video, image_processor: Any, folder: Path, bounds: PixelBounds, dims: ModelDims[VisionDims]
) -> Picture:
    """The video's frames as patches; consecutive frames share one, and the last frame is repeated where one is left.

    Every frame stays within the bounds, as a picture does.

    Raises:
        CapaError: a setting is malformed, or the bounds cannot be kept.
        ValueError: the image processor refuses the frames' shape.
    """
    vision, settings = dims.vision, _settings(folder)
    missing = -len(video.frames) % vision.temporal_patch_size
    frames = [*video.frames, *[video.frames[-1]] * missing]
    shared = {key: settings.data[key] for key in _SHARED if key in settings.data}
    sizes = _sizes(settings, len(video.frames), bounds, dims)
    limits = bounds.model_copy(update={"min_pixels": None, "max_pixels": None})
    told = {"size": sizes["size"], **picture_options(video.frames[0].size, sizes, limits, dims)}
    processed = image_processor(images=frames, return_tensors="np", **shared, **told)
    _, rows, cols = np.asarray(processed["image_grid_thw"])[0].tolist()
    flat = np.asarray(processed["pixel_values"], dtype=np.float32)
    patches_FNCPv = flat.reshape(len(frames), rows * cols, vision.in_channels, vision.temporal_patch_size, -1)
    # A picture's patch holds its one frame P times.
    frames_FNCv = patches_FNCPv[:, :, :, 0]
    groups = frames_FNCv.reshape(-1, vision.temporal_patch_size, *frames_FNCv.shape[1:]).transpose(0, 2, 3, 1, 4)
    merge = vision.spatial_merge_size
    shape = (len(groups), rows // merge, cols // merge, merge * merge, vision.patch_values)
    seconds = vision.temporal_patch_size / video.fps
    return Picture(
        np.ascontiguousarray(groups).reshape(shape),
        num_tokens=shape[0] * shape[1] * shape[2],
        frame_seconds=seconds,
        frame_positions=float(np.float32(vision.tokens_per_second) * np.float32(seconds)),
    )


def _settings(folder: Path) -> Section:
    """The settings that transformers would give its video processor: the first file that has some."""
    processor = _read(folder / "processor_config.json")
    if "video_processor" in processor:
        return Section(processor, str(folder / "processor_config.json"), "").section("video_processor")
    found = next((folder / name for name in _FILES if (folder / name).is_file()), folder)
    return Section(_read(found), str(found), "")


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CapaError(f"{path}: is no JSON: {error}") from error
    if not isinstance(data, dict):
        raise CapaError(f"{path}: is no JSON object")
    return cast("dict[str, Any]", data)


def _sizes(settings: Section, num_frames: int, bounds: PixelBounds, dims: ModelDims[VisionDims]) -> dict[str, Any]:
    """The settings of a frame's size, the user's area in place of theirs."""
    vision, settings = dims.vision, Section(whole_numbers(settings.data), settings.where, settings.name)
    size = settings.section("size") if settings.data.get("size") else Section({}, settings.where, "size")
    least = settings.count("min_pixels", size.count("shortest_edge", _MIN_PIXELS))
    most = settings.count("max_pixels", size.count("longest_edge", _MAX_PIXELS))
    sizes = {
        "do_resize": settings.data.get("do_resize", True),
        "size": {"shortest_edge": least, "longest_edge": most},
    }
    check_bounds(sizes, bounds, dims)
    least, most = pixel_area(sizes, bounds)
    if settings.data.get("cap_pixels_per_frame"):
        unit = vision.patch_size * vision.spatial_merge_size
        budget = int(settings.count("max_video_tokens", _MAX_VIDEO_TOKENS) * unit * unit * 0.9)
        most = max(min(most, budget * vision.temporal_patch_size // num_frames), int(least * 1.05))
    return {**sizes, "size": {"shortest_edge": least, "longest_edge": most}}
