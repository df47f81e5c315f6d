"""Decodes a picture file to what a person sees of it."""

import warnings
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from capa_export.base.errors import CapaError, first_line
from capa_export.base.files import is_special
from capa_export.base.progress import say

__all__ = ["MOST_BYTES", "PICTURE_SUFFIXES", "check_size", "open_picture", "opened", "pictures_among", "upright_rgb"]

PICTURE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}

MOST_BYTES = 1 << 29
"""Of a picture's file: one of the most pixels fits uncompressed."""
_MOST_PIXELS = 1 << 27
"""Above the 108 megapixels of the largest phones, and 1.2 GB of memory until they are resized."""
_MOST_ASPECT = 1000
"""The longer side over the shorter one, since what is resized by its shorter side grows with it."""
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Those that pictures are kept in, whatever their names end in: of Pillow's others, one starts programs."""
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0
"""Two tags of TIFF, and a value of the second."""
_ANIMATED = {"GIF", "PNG", "TIFF", "WEBP", "AVIF"}
"""Formats whose further frames are more of the same, and not a thumbnail or a depth map."""
_SPACES = {"RGB": "RGB ", "CMYK": "CMYK", "L": "GRAY", "LAB": "Lab "}
"""Pillow's mode -> the colour space in a profile's header."""
_INTS_OF_16_BITS = ("PNG", "PPM")
"""Formats whose 16 bits Pillow may decode to 32."""
_DARK = 16
"""A picture that uses less than this part of its range looks black."""
_WHITE = 255


def pictures_among(paths: Iterable[Path]) -> list[Path]:
    """The paths that have a picture's suffix and are no folders, sorted."""
    return sorted(path for path in paths if path.suffix.lower() in PICTURE_SUFFIXES and not path.is_dir())


def open_picture(path: Path, data: bytes | None = None) -> Image.Image:
    """Open the picture at `path`, upright, in RGB and over white; `data` is the file where it has been read.

    What a person would see otherwise is said on stderr, once.

    Raises:
        CapaError: there is none, or it does not decode, or it is too large.
    """
    with opened(path, data) as image:
        if getattr(image, "is_animated", False) and image.format in _ANIMATED:
            _warn(f"{path}: has several frames, of which the first is shown; a video shows them all")
        return upright_rgb(image, str(path))


@contextmanager
def opened(path: Path, data: bytes | None = None) -> Generator[Image.Image]:
    """A picture's file, of which the block decodes as much as it wants.

    Args:
        path: of the file.
        data: the file where it has been read.

    Raises:
        CapaError: there is none, it is no picture, it is too large, or the block finds that it does not decode.
    """
    if data is None and is_special(path):
        raise CapaError(f"{path}: is no file; replace or remove it")
    try:
        with warnings.catch_warnings():
            # About sizes that are refused below, or are not.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path if data is None else BytesIO(data), formats=_FORMATS)
        with image:
            check_size(image, str(path))
            yield image
    except CapaError:
        raise
    except FileNotFoundError as error:
        if str(path).startswith(("http:", "https:")):
            raise CapaError(f"{path}: nothing is downloaded; save the picture and give its path") from error
        raise CapaError(f"{path}: no such picture") from error
    except Image.DecompressionBombError as error:
        raise CapaError(f"{path}: too many pixels for Pillow to open; resize the picture") from error
    except UnidentifiedImageError as error:
        raise CapaError(f"{path}: not a readable picture; replace or remove it") from error
    except Exception as error:  # What a decoder raises on a malformed file, it does not say.
        raise CapaError(f"{path}: not a readable picture ({first_line(error)}); replace or remove it") from error


def check_size(image: Image.Image, name: str) -> None:
    """Refuse a picture that would not fit into memory, before it is decoded.

    Raises:
        CapaError: it has too many pixels, or one side is far longer than the other.
    """
    # These are decoded by way of FP64, or twice.
    copies = 4 if image.mode[0] in "IF" else 2 if image.has_transparency_data else 1
    width, height = image.size
    if width * height > (most := _MOST_PIXELS // copies):
        raise CapaError(f"{name}: {width} x {height} pixels, and at most {most} are read; resize the picture")
    if max(image.size) > _MOST_ASPECT * min(image.size):
        raise CapaError(
            f"{name}: {width} x {height} pixels, one side more than {_MOST_ASPECT} times the other; crop the picture"
        )


def upright_rgb(image: Image.Image, name: str) -> Image.Image:
    """An opened picture, or the frame it stands at, as a viewer shows it on white; `name` is for warnings."""
    upright = ImageOps.exif_transpose(image)
    if upright.mode[0] in "IF":
        return Image.fromarray(_eight_bits(upright, name, image)).convert("RGB")
    if not upright.has_transparency_data:
        return _in_srgb(upright)
    key = upright.info.get("transparency")
    if isinstance(key, tuple) and max(key) > _WHITE:
        # Of a file with 16 bits a channel, of which Pillow decodes 8.
        upright.info["transparency"] = tuple(part >> 8 for part in key)
    alpha = upright.convert("RGBA").getchannel("A")
    return Image.composite(_in_srgb(upright), Image.new("RGB", upright.size, "white"), alpha)


def _eight_bits(upright: Image.Image, name: str, opened: Image.Image) -> "np.ndarray[Any, Any]":
    """Grey of more than 8 bits, or of floating point, scaled to 8: the range is the format's where it has one."""
    tags = getattr(opened, "tag_v2", {})
    values = np.asarray(upright).astype(np.float64)
    shown = np.isfinite(values)
    least, most = (float(pick(values[shown])) for pick in (np.min, np.max)) if shown.any() else (0.0, 0.0)
    if upright.mode != "F" and (upright.mode != "I" or opened.format in _INTS_OF_16_BITS):
        low, high = 0.0, float(2 ** tags.get(_BITS_PER_SAMPLE, (16,))[0] - 1)
        if 0 < most < high / _DARK:
            _warn(f"{name}: nearly black, as in a viewer: its values end at {most:.0f} of {high:.0f}; brighten it")
    elif upright.mode == "F" and least >= 0 and most <= 1:
        low, high = 0.0, 1.0
    else:
        low, high = least, max(most, least + 1e-9)
        kind = "floating point" if upright.mode == "F" else "32 bits"
        _warn(f"{name}: {kind} of no known range: {least:g} is shown black, {most:g} white")
    if not shown.all():
        _warn(f"{name}: values that are no number are shown black")
    grey = np.where(shown, (np.where(shown, values, low) - low) / (high - low), 0).clip(0, 1)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        grey = 1 - grey
    if isinstance(key := upright.info.get("transparency"), int):
        grey[values == key] = 1
    return (grey * _WHITE).round().astype(np.uint8)


def _in_srgb(image: Image.Image) -> Image.Image:
    """The colours without their transparency, by the picture's own colour profile where it has one."""
    # What a palette says of transparency is only heeded on the way to RGBA.
    image = image.convert("RGBA") if image.mode in ("P", "PA") else image
    mode = {"LA": "L"}.get(image.mode, image.mode)
    colours = image.convert(mode if mode in _SPACES else "RGB")
    stored = image.info.get("icc_profile")
    if not stored and colours.mode != "LAB":
        return colours.convert("RGB")
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(stored) if stored else ImageCms.createProfile("LAB"))
        profile: Any = source.profile
        usual = "sRGB" in (profile.profile_description or "")
        if profile.xcolor_space != _SPACES[colours.mode] or (usual and colours.mode == "RGB"):
            return colours.convert("RGB")
        converted = ImageCms.profileToProfile(colours, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        # A viewer, too, shows a picture whose profile is broken without it.
        return colours.convert("RGB")
    assert converted is not None
    return converted


@cache
def _warn(line: str) -> None:
    say(f"warning: {line}")
