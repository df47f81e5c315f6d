"""Pictures as transformers' image processors make them with Pillow.

H = height, W = width, C = channels.
"""

from collections.abc import Callable, Sequence
from itertools import product
from math import ceil
from typing import Annotated, Any, Literal

import numpy as np
from PIL import Image
from pydantic import Field

from capa_export.base.toml import Settings
from capa_export.model.picture_sizes import sides_within, tile_grid

__all__ = ["PictureProcessor", "PictureSettings", "PictureSize"]


class PictureSize(Settings):
    """A size in one of the ways that settings give it."""

    height: int | None = None
    width: int | None = None
    shortest_edge: int | None = None
    longest_edge: int | None = None
    max_height: int | None = None
    max_width: int | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None


class PictureSettings(Settings):
    """The settings of an image processor, under transformers' names."""

    kind: Literal["plain", "squared", "tiles", "patches"]
    """Kind of processing: resized and cropped; the same, padded to a square first; tiles; flat patches."""
    do_resize: bool | None = None
    size: PictureSize | None = None
    resample: int | None = None
    do_center_crop: bool | None = None
    crop_size: PictureSize | None = None
    do_rescale: bool | None = None
    rescale_factor: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Zero would make every picture black."""
    do_normalize: bool | None = None
    image_mean: float | tuple[float, ...] | None = None
    image_std: float | tuple[float, ...] | None = None
    do_pad: bool | None = None
    pad_size: PictureSize | None = None
    crop_to_patches: bool | None = None
    min_patches: int | None = None
    max_patches: int | None = None
    patch_size: int | None = None
    temporal_patch_size: int | None = None
    merge_size: int | None = None


class PictureProcessor:
    """Makes the arrays that a vision tower is fed."""

    def __init__(self, settings: PictureSettings) -> None:
        self.settings = settings

    def __getattr__(self, name: str) -> Any:
        """A setting, by transformers' name for it."""
        if name not in PictureSettings.model_fields:
            raise AttributeError(name)
        value = getattr(self.settings, name)
        return value.model_dump(exclude_none=True) if isinstance(value, PictureSize) else value

    def __call__(self, images: Sequence[Image.Image], **changes: Any) -> dict[str, np.ndarray]:
        """Process pictures, with other settings for this call where `changes` names some.

        Raises:
            ValueError: a picture's shape is refused, or a setting is missing or malformed.
        """
        changes.pop("return_tensors", None)
        settings = PictureSettings.model_validate({**self.settings.model_dump(), **changes})
        return _WAYS[settings.kind]([_rgb(image) for image in images], settings)


def _rgb(image: Image.Image) -> np.ndarray:
    """The picture as [H, W, 3] uint8, on white where it is transparent."""
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.array(image.convert("RGB"))


def _plain(pictures: list[np.ndarray], settings: PictureSettings) -> dict[str, np.ndarray]:
    scaled = [_scaled(_cropped(_fitted(picture, settings), settings), settings) for picture in pictures]
    if settings.do_pad:
        scaled = _padded(scaled, settings.pad_size)
    return {"pixel_values": np.stack(scaled)}


def _squared(pictures: list[np.ndarray], settings: PictureSettings) -> dict[str, np.ndarray]:
    if settings.do_pad:
        mean = settings.image_mean
        colour = [int(value * 255) for value in mean] if isinstance(mean, tuple) else [0] * 3
        pictures = [_square(picture, colour) for picture in pictures]
    return _plain(pictures, settings.model_copy(update={"do_pad": False}))


def _tiles(pictures: list[np.ndarray], settings: PictureSettings) -> dict[str, np.ndarray]:
    cut = settings.crop_to_patches and (settings.max_patches or 0) > 1
    parts = [_cut(picture, settings) if cut else [_fitted(picture, settings)] for picture in pictures]
    return {
        "pixel_values": np.stack([_scaled(tile, settings) for tiles in parts for tile in tiles]),
        "num_patches": np.array([len(tiles) for tiles in parts]),
    }


def _patches(pictures: list[np.ndarray], settings: PictureSettings) -> dict[str, np.ndarray]:
    side, frames, merge = settings.patch_size, settings.temporal_patch_size, settings.merge_size
    if not (side and frames and merge):
        raise ValueError("patch_size, temporal_patch_size and merge_size are not all set")
    flat: list[np.ndarray] = []
    grids: list[tuple[int, int, int]] = []
    for picture in pictures:
        resized = _resized_by_area(picture, settings, side * merge) if settings.do_resize else picture
        pixels_CHW = _scaled(resized, settings).astype(np.float32)
        rows, cols = pixels_CHW.shape[1] // side, pixels_CHW.shape[2] // side
        split = pixels_CHW.reshape(3, rows // merge, merge, side, cols // merge, merge, side)
        patches = split.transpose(1, 4, 2, 5, 0, 3, 6)[:, :, :, :, :, None]
        repeated = np.broadcast_to(patches, (*patches.shape[:5], frames, side, side))
        flat.append(repeated.reshape(rows * cols, -1))
        grids.append((1, rows, cols))
    return {"pixel_values": np.concatenate(flat), "image_grid_thw": np.array(grids, np.int64)}


_WAYS: dict[str, Callable[[list[np.ndarray], PictureSettings], dict[str, np.ndarray]]] = {
    "plain": _plain,
    "squared": _squared,
    "tiles": _tiles,
    "patches": _patches,
}


def _scaled(picture_HWC: np.ndarray, settings: PictureSettings) -> np.ndarray:
    """[C, H, W], rescaled and normalized; FP32 unless it is neither."""
    if settings.do_rescale:
        if settings.rescale_factor is None:
            raise ValueError("do_rescale is set and rescale_factor is not")
        picture_HWC = (picture_HWC.astype(np.float64) * settings.rescale_factor).astype(np.float32)
    if settings.do_normalize:
        if settings.image_mean is None or settings.image_std is None:
            raise ValueError("do_normalize is set, and image_mean or image_std is not")
        mean, std = (np.array(value, np.float32) for value in (settings.image_mean, settings.image_std))
        picture_HWC = (picture_HWC.astype(np.float32) - mean) / std
    return picture_HWC.transpose(2, 0, 1)


def _fitted(picture: np.ndarray, settings: PictureSettings) -> np.ndarray:
    if not settings.do_resize:
        return picture
    return _resized(picture, _fitting(picture.shape[0], picture.shape[1], settings.size or PictureSize()), settings)


def _resized(picture: np.ndarray, size: tuple[int, int], settings: PictureSettings) -> np.ndarray:
    height, width = size
    kernel = Image.Resampling.BILINEAR if settings.resample is None else Image.Resampling(settings.resample)
    return np.array(Image.fromarray(picture).resize((width, height), kernel))


def _fitting(height: int, width: int, size: PictureSize) -> tuple[int, int]:
    """The height and width that a size means for a picture."""
    short, long = min(height, width), max(height, width)
    if size.shortest_edge and size.longest_edge:
        return _fitting_between(height, width, size.shortest_edge, size.longest_edge)
    if edge := size.shortest_edge:
        longer = int(edge * long / short)
        return (longer, edge) if width <= height else (edge, longer)
    if size.max_height and size.max_width:
        scale = min(size.max_height / height, size.max_width / width)
        return int(height * scale), int(width * scale)
    if size.height and size.width:
        return size.height, size.width
    raise ValueError("size holds neither height and width, nor max_height and max_width, nor shortest_edge")


def _fitting_between(height: int, width: int, edge: int, most: int) -> tuple[int, int]:
    short, long = float(min(height, width)), float(max(height, width))
    exact: float = edge
    if long / short * edge > most:
        exact = most * short / long
        edge = round(exact)
    if short == edge:
        return height, width
    return (int(exact * height / width), edge) if width < height else (edge, int(exact * width / height))


def _resized_by_area(picture: np.ndarray, settings: PictureSettings, factor: int) -> np.ndarray:
    """A picture of about its own shape, both sides multiples of `factor`, its area within the size's two edges."""
    height, width = picture.shape[:2]
    size = settings.size or PictureSize()
    least, most = size.shortest_edge, size.longest_edge
    if not least or not most:
        raise ValueError("size must hold shortest_edge and longest_edge")
    if (ratio := max(height, width) / min(height, width)) > 200:
        raise ValueError(f"absolute aspect ratio must be smaller than 200, got {ratio}")
    rows, cols = sides_within((height, width), factor, least, most)
    return _resized(picture, (rows * factor, cols * factor), settings)


def _cropped(picture: np.ndarray, settings: PictureSettings) -> np.ndarray:
    """The middle of a picture; what it lacks is black, an odd row or column of it above and to the left."""
    if not settings.do_center_crop:
        return picture
    crop = settings.crop_size or PictureSize()
    if crop.height is None or crop.width is None:
        raise ValueError("crop_size must hold height and width")
    height, width = picture.shape[:2]
    top, left = (height - crop.height) // 2, (width - crop.width) // 2
    if top < 0 or left < 0:
        above, beside = (ceil(max(0, wanted - has) / 2) for wanted, has in ((crop.height, height), (crop.width, width)))
        below, beyond = max(0, crop.height - height) - above, max(0, crop.width - width) - beside
        picture = np.pad(picture, ((above, below), (beside, beyond), (0, 0)))
        top, left = top + above, left + beside
    return picture[max(0, top) : top + crop.height, max(0, left) : left + crop.width]


def _square(picture: np.ndarray, colour: Sequence[int]) -> np.ndarray:
    """The picture in the middle of a square of its longer side."""
    height, width = picture.shape[:2]
    side = max(height, width)
    whole = np.empty((side, side, 3), picture.dtype)
    whole[...] = colour
    top, left = (side - height) // 2, (side - width) // 2
    whole[top : top + height, left : left + width] = picture
    return whole


def _padded(pictures_CHW: list[np.ndarray], size: PictureSize | None) -> list[np.ndarray]:
    """All of one size, zero below and to the right."""
    sides = np.max([picture.shape[1:] for picture in pictures_CHW], axis=0).tolist()
    height, width = sides if size is None else (size.height or 0, size.width or 0)
    if any(picture.shape[1] > height or picture.shape[2] > width for picture in pictures_CHW):
        raise ValueError(f"pad_size is {height} x {width}, smaller than the picture")
    return [
        np.pad(picture, ((0, 0), (0, height - picture.shape[1]), (0, width - picture.shape[2])))
        for picture in pictures_CHW
    ]


def _cut(picture: np.ndarray, settings: PictureSettings) -> list[np.ndarray]:
    """The picture's tiles, row by row, and the whole of it in one more where there are several."""
    size = settings.size or PictureSize()
    if not size.height or not size.width:
        raise ValueError("size must hold height and width")
    bounds = settings.min_patches or 0, settings.max_patches or 0
    num_cols, num_rows = tile_grid(picture.shape[1], picture.shape[0], size.height * size.width, *bounds)
    whole = _resized(picture, (num_rows * size.height, num_cols * size.width), settings)
    corners = product(range(0, whole.shape[0], size.height), range(0, whole.shape[1], size.width))
    tiles = [whole[top : top + size.height, left : left + size.width] for top, left in corners]
    return tiles if len(tiles) == 1 else [*tiles, _resized(picture, (size.height, size.width), settings)]
