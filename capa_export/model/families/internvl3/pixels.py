"""The number of tiles that InternVL's image processor cuts a picture into."""

from collections.abc import Mapping
from math import ceil
from typing import Any

from capa_export.base.dims import ModelDims
from capa_export.base.errors import CapaError, ExitCode
from capa_export.config.pixels import PixelBounds
from capa_export.model.families.internvl3.dims import VisionDims
from capa_export.model.picture_sizes import tile_grid

__all__ = ["check_bounds", "num_tokens", "picture_options"]

_FEWEST, _MOST = 1, 12
"""Fewest and most tiles where no file says otherwise, as in transformers."""


def check_bounds(settings: Mapping[str, Any], bounds: PixelBounds, dims: ModelDims[VisionDims]) -> None:
    """Refuse bounds that cannot be kept.

    Raises:
        CapaError: they allow not even one tile, or contradict the image processor's own or the device's.
    """
    side, most = dims.vision.image_size, bounds.max_pixels
    if most is not None and most < side**2:
        raise CapaError(
            f"--max-pixels {most}: this model sees at least one tile of {side} x {side} pixels; give {side**2} or more",
            ExitCode.USAGE,
        )
    tiles = _tiles(settings, PixelBounds(min_pixels=bounds.min_pixels, max_pixels=most), dims)
    if tiles["min_patches"] > tiles["max_patches"]:
        raise CapaError(
            f"--min-pixels {bounds.min_pixels}: this model's pictures have at most {tiles['max_patches']} tiles of "
            f"{side} x {side} pixels; give --max-pixels, too",
            ExitCode.USAGE,
        )
    allowed = _within(bounds.max_tiles, tiles["max_patches"])
    for option, value, count in (
        ("--min-pixels", bounds.min_pixels, tiles["min_patches"]),
        ("--max-pixels", most, tiles["max_patches"]),
    ):
        if value is not None and count > allowed:
            raise CapaError(
                f"{option} {value}: the target takes {bounds.max_tiles} tiles of {side} x {side} pixels, the "
                f"thumbnail among them; give {allowed * side**2} or less, or {bounds.lifted}",
                ExitCode.USAGE,
            )


def picture_options(
    _size: tuple[int, int], settings: Mapping[str, Any], bounds: PixelBounds, dims: ModelDims[VisionDims]
) -> dict[str, Any]:
    """Options for the image processor that keep a picture within the bounds."""
    tiles = _tiles(settings, bounds, dims)
    return {} if tiles == _tiles(settings, PixelBounds(), dims) else tiles


def num_tokens(
    size: tuple[int, int], settings: Mapping[str, Any], bounds: PixelBounds, dims: ModelDims[VisionDims]
) -> int:
    """Visual tokens of a picture of this width and height."""
    tiles = _tiles(settings, bounds, dims)
    cols, rows = tile_grid(*size, dims.vision.image_size**2, tiles["min_patches"], tiles["max_patches"])
    count = cols * rows
    return (count + (count > 1)) * dims.vision.tokens_per_tile


def _tiles(settings: Mapping[str, Any], bounds: PixelBounds, dims: ModelDims[VisionDims]) -> dict[str, int]:
    """The user's bounds in tiles, or else the image processor's own; its fewest yield to the most."""
    area = dims.vision.image_size**2
    most = bounds.max_pixels // area if bounds.max_pixels else settings.get("max_patches", _MOST)
    most = _within(bounds.max_tiles, most)
    fewest = min(settings.get("min_patches", _FEWEST), most)
    if bounds.min_pixels:
        fewest = ceil(bounds.min_pixels / area)
    return {"min_patches": fewest, "max_patches": most}


def _within(max_tiles: int | None, most: int) -> int:
    """Most tiles that leave a place for the thumbnail."""
    return most if max_tiles is None else min(most, max(1, max_tiles - 1))
