"""Videos for Qwen2.5-VL, by the image processor: transformers' own video processor needs torchvision.

F = frames, P = frames that share a patch, N = patches of a frame, C = channels.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from capa_export.dims import ModelDims, Section
from capa_export.errors import CapaError
from capa_export.families.qwen25vl.dims import Vision
from capa_export.prompt import Picture, Video

__all__ = ["video"]

_FILES = ("video_preprocessor_config.json", "preprocessor_config.json")
_MIN_PIXELS, _MAX_PIXELS = 128 * 28 * 28, 768 * 28 * 28
_MAX_VIDEO_TOKENS = 128_000
"""These three where no file says otherwise, as in transformers."""
_SHARED = ("do_resize", "do_rescale", "do_normalize", "image_mean", "image_std", "resample", "rescale_factor")


def video(video: Video, image_processor: Any, folder: Path, dims: ModelDims[Vision]) -> Picture:
    """The video's frames as patches; consecutive frames share one, and the last frame is repeated where one is left.

    Raises:
        CapaError: a setting is malformed.
        ValueError: the image processor refuses the frames' shape.
    """
    vision, settings = dims.vision, _settings(folder)
    missing = -len(video.frames) % vision.temporal_patch_size
    frames = [*video.frames, *[video.frames[-1]] * missing]
    unit = vision.patch_size * vision.spatial_merge_size
    size = _size(settings, len(video.frames), unit, vision.temporal_patch_size)
    shared = {key: settings.data[key] for key in _SHARED if key in settings.data}
    processed = image_processor(images=frames, size=size, return_tensors="np", **shared)
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
    """What transformers would give its video processor: the first file that has something for it."""
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


def _size(settings: Section, num_frames: int, unit: int, temporal_patch_size: int) -> dict[str, int]:
    """Least and most pixels of a frame."""
    size = settings.section("size") if settings.data.get("size") else Section({}, settings.where, "size")
    least = settings.count("min_pixels", size.count("shortest_edge", _MIN_PIXELS))
    most = settings.count("max_pixels", size.count("longest_edge", _MAX_PIXELS))
    if settings.data.get("cap_pixels_per_frame"):
        budget = int(settings.count("max_video_tokens", _MAX_VIDEO_TOKENS) * unit * unit * 0.9)
        most = max(min(most, budget * temporal_patch_size // num_frames), int(least * 1.05))
    return {"shortest_edge": least, "longest_edge": most}
