"""The sizes that Qwen's image processor resizes pictures to: whole visual tokens within bounds."""

from collections.abc import Mapping
from math import ceil, floor
from typing import Any, NamedTuple

from capa_export.base.dims import ModelDims
from capa_export.base.errors import CapaError, ExitCode
from capa_export.config.pixels import PixelBounds
from capa_export.model.families.qwen25vl.dims import VisionDims
from capa_export.model.picture_sizes import sides_within

__all__ = ["check_bounds", "num_tokens", "picture_options", "pixel_area"]

_LEAST, _MOST = 56 * 56, 28 * 28 * 1280
"""Pixels where no file says otherwise, as in transformers."""


class _Area(NamedTuple):
    """Bounds of the pixels that a picture is resized to."""

    least: int
    most: int


def check_bounds(settings: Mapping[str, Any], bounds: PixelBounds, dims: ModelDims[VisionDims]) -> None:
    """Refuse bounds that cannot be kept.

    Raises:
        CapaError: the image processor does not resize, or they contradict its own or the device's.
    """
    _check_patches(settings, dims)
    if not settings.get("do_resize", True):
        bounds.refuse("this model's image processor does not resize (do_resize is false); resize the pictures")
    area = pixel_area(settings, bounds)
    if area.least > area.most:
        raise CapaError(
            f"--min-pixels {area.least}: this model sees at most {area.most} pixels; give --max-pixels, too",
            ExitCode.USAGE,
        )
    unit = _unit(dims)
    if bounds.max_pixels is not None and bounds.max_pixels < unit**2:
        raise CapaError(
            f"--max-pixels {bounds.max_pixels}: one visual token is {unit} x {unit} pixels; give {unit**2} or more",
            ExitCode.USAGE,
        )
    if bounds.max_rows is None or bounds.max_cols is None:
        return
    largest = bounds.max_rows * bounds.max_cols * unit**2
    for option, pixels in (("--min-pixels", bounds.min_pixels), ("--max-pixels", bounds.max_pixels)):
        if pixels is not None and pixels > largest:
            raise CapaError(
                f"{option} {pixels}: the target takes {bounds.max_rows} x {bounds.max_cols} visual tokens of "
                f"{unit} x {unit} pixels; give {largest} or less, or {bounds.lifted}",
                ExitCode.USAGE,
            )


def _check_patches(settings: Mapping[str, Any], dims: ModelDims[VisionDims]) -> None:
    """Refuse patches that the vision tower does not take, before a picture is cut into them.

    Raises:
        CapaError: the image processor's are others.
    """
    vision = dims.vision
    side, frames = (
        settings.get(name, own)
        for name, own in (("patch_size", vision.patch_size), ("temporal_patch_size", vision.temporal_patch_size))
    )
    merge = settings.get("merge_size", vision.spatial_merge_size)
    if not all(isinstance(value, int) for value in (side, frames, merge)):
        return
    told = (vision.in_channels * frames * side**2, merge)
    own = (vision.patch_values, vision.spatial_merge_size)
    for made, implied, what in zip(told, own, ("patches of {} numbers", "squares of {} patches a side"), strict=True):
        if made != implied:
            raise CapaError(
                f"preprocessor_config.json makes {what.format(made)}, config.json implies {implied}; use the two files "
                "that were published together"
            )


def picture_options(
    size: tuple[int, int], settings: Mapping[str, Any], bounds: PixelBounds, dims: ModelDims[VisionDims]
) -> dict[str, Any]:
    """Options for the image processor that keep a picture of this width and height within the bounds."""
    area = _fitting(size, settings, bounds, dims)
    if not settings.get("do_resize", True) or area == pixel_area(settings, PixelBounds()):
        return {}
    return {"size": {"shortest_edge": area.least, "longest_edge": area.most}}


def num_tokens(
    size: tuple[int, int], settings: Mapping[str, Any], bounds: PixelBounds, dims: ModelDims[VisionDims]
) -> int:
    """Visual tokens of a picture of this width and height."""
    unit = _unit(dims)
    if not settings.get("do_resize", True):
        return (size[0] // unit) * (size[1] // unit)
    cols, rows = sides_within(size, unit, *_fitting(size, settings, bounds, dims))
    return cols * rows


def _unit(dims: ModelDims[VisionDims]) -> int:
    """Side of a visual token in pixels."""
    return dims.vision.patch_size * dims.vision.spatial_merge_size


def pixel_area(settings: Mapping[str, Any], bounds: PixelBounds) -> _Area:
    """The user's bounds, or else the image processor's own; its least yields to the user's most."""
    size = settings.get("size", {})
    most = bounds.max_pixels or size.get("longest_edge") or _MOST
    least = size.get("shortest_edge") or _LEAST
    return _Area(bounds.min_pixels or min(least, most), most)


def _fitting(
    size: tuple[int, int], settings: Mapping[str, Any], bounds: PixelBounds, dims: ModelDims[VisionDims]
) -> _Area:
    """The area in which this picture has no more rows and columns than it may."""
    area, unit = pixel_area(settings, bounds), _unit(dims)
    cols, rows = sides_within(size, unit, *area)

    def fits(area: _Area) -> bool:
        own = sides_within(size, unit, *area)
        return all(
            limit is None or side <= limit for side, limit in zip(own, (bounds.max_cols, bounds.max_rows), strict=True)
        )

    if fits(area):
        return area
    limits = (bounds.max_cols or cols, bounds.max_rows or rows)
    scale = min(limit * unit / side for limit, side in zip(limits, size, strict=True))
    exact = size[0] * size[1] * scale**2
    # Below what it has, or it would be rounded up to whole tokens and left at that. What is thinner than half a token
    # has no area, and is enlarged to the least: rounded up, so a little less.
    mosts = [max(1, min(whole, cols * rows * unit**2 - 1)) for whole in (ceil(exact), floor(exact))]
    areas = [_Area(min(area.least, max(1, most - 1)), most) for most in mosts]
    return next((area for area in areas if fits(area)), areas[-1])
