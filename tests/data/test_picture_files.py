"""Pictures of every kind are decoded as a viewer shows them, or it is said that they are not."""

import os
import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from capa_export.base.errors import CapaError
from capa_export.data.conversation import open_video
from capa_export.data.picture_files import open_picture

RAMP = np.linspace(0, 1, 64).reshape(8, 8)
WANTED = (RAMP * 255).round()


@pytest.fixture
def stored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[np.ndarray, str]]:
    """What is decoded of a picture once it is saved, and what is said about it."""

    def save(image: Image.Image, suffix: str = ".png", **options: Any) -> tuple[np.ndarray, str]:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}{suffix}"
        image.save(path, **options)
        shown = open_picture(path)
        assert shown.mode == "RGB"
        return np.asarray(shown).astype(int), capsys.readouterr().err

    return save


def same(shown: np.ndarray, wanted: np.ndarray, within: int = 1) -> bool:
    """Viewers round to 8 bits in one way or the other."""
    return shown.shape == (*wanted.shape[:2], 3) and bool(
        (np.abs(shown - wanted.reshape(*wanted.shape[:2], -1)) <= within).all()
    )


@pytest.mark.parametrize("suffix", [".png", ".tiff", ".pgm"])
def test_sixteen_bits(stored: Any, suffix: str) -> None:
    shown, said = stored(Image.fromarray((RAMP * 65535).round().astype(np.uint16)), suffix)
    assert same(shown, WANTED) and not said


def test_sixteen_bits_that_hardly_differ_from_black(stored: Any) -> None:
    shown, said = stored(Image.fromarray((RAMP * 4095).round().astype(np.uint16)))
    assert same(shown, RAMP * 4095 / 257) and "nearly black, as in a viewer: its values end at 4095 of 65535" in said


def test_tiff_of_inverted_grey(stored: Any) -> None:
    shown, said = stored(Image.fromarray((RAMP * 65535).round().astype(np.uint16)), ".tiff", tiffinfo={262: 0})
    assert same(shown, 255 - WANTED) and not said


def test_floating_point_and_32_bits(stored: Any) -> None:
    shown, said = stored(Image.fromarray(RAMP.astype(np.float32)), ".tiff")
    assert same(shown, WANTED) and not said
    shown, said = stored(Image.fromarray((RAMP * 80 - 20).astype(np.float32)), ".tiff")
    assert same(shown, WANTED) and "floating point of no known range: -20 is shown black, 60 white" in said
    shown, said = stored(Image.fromarray((RAMP * 1e6 - 5e5).astype(np.int32)), ".tiff")
    assert same(shown, WANTED) and "32 bits of no known range" in said
    broken = np.where(RAMP > 0.5, np.nan, RAMP).astype(np.float32)
    shown, said = stored(Image.fromarray(broken), ".tiff")
    assert same(shown, np.where(RAMP > 0.5, 0, WANTED)) and "no number" in said


def test_what_is_transparent_is_white(stored: Any) -> None:
    grey, alpha = np.full((8, 8), 40, np.uint8), (RAMP * 255).round().astype(np.uint8)
    on_white = 255 - (255 - 40) * RAMP
    for image in (
        Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)]),
        Image.merge("RGBA", [Image.fromarray(grey)] * 3 + [Image.fromarray(alpha)]),
    ):
        shown, said = stored(image)
        assert same(shown, on_white) and not said
    palette = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8), "L").convert("P")
    wanted = np.arange(64).reshape(8, 8)
    for suffix in (".png", ".gif"):
        shown, _ = stored(palette, suffix, transparency=5)
        assert same(shown, np.where(wanted == 5, 255, wanted))
    shown, _ = stored(palette, transparency=bytes(range(64)))
    assert same(shown, 255 - (255 - wanted) * wanted / 255)
    shown, _ = stored(Image.fromarray(grey), transparency=40)
    assert same(shown, np.full((8, 8), 255))
    shown, _ = stored(Image.fromarray((RAMP * 65535).round().astype(np.uint16)), transparency=0)
    assert same(shown, np.where(RAMP == 0, 255, WANTED))
    shown, _ = stored(Image.new("RGB", (8, 8), (1, 2, 3)), transparency=(1, 2, 3))
    assert same(shown, np.full((8, 8), 255))


def test_a_transparent_colour_of_sixteen_bits(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pixels = zlib.compress(b"\0" + struct.pack(">6H", 65535, 0, 0, 256, 512, 65535))
    header, key = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0), struct.pack(">HHH", 65535, 0, 0)
    parts = ((b"IHDR", header), (b"tRNS", key), (b"IDAT", pixels), (b"IEND", b""))
    path = tmp_path / "keyed.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts))
    assert np.asarray(open_picture(path)).tolist() == [[[255, 255, 255], [1, 2, 255]]]


def test_cmyk_and_black_and_white(stored: Any) -> None:
    shown, said = stored(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), ".tiff")
    assert same(shown, np.broadcast_to([255, 0, 0], (8, 8, 3))) and not said
    shown, _ = stored(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), ".jpg")
    assert same(shown, np.broadcast_to([255, 0, 0], (8, 8, 3)), within=4)
    shown, _ = stored(Image.fromarray(RAMP > 0.5))
    assert same(shown, np.where(RAMP > 0.5, 255, 0))


def test_a_colour_profile_is_heeded(stored: Any) -> None:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    red = Image.new("RGB", (8, 8), (200, 30, 40))
    shown, _ = stored(ImageCms.profileToProfile(red, srgb, lab, outputMode="LAB"), ".tiff")
    assert same(shown, np.broadcast_to([200, 30, 40], (8, 8, 3)), within=3)
    shown, _ = stored(red, icc_profile=srgb.tobytes())
    assert same(shown, np.asarray(red).astype(int), within=0)
    for broken in (b"no profile", lab.tobytes()):
        shown, _ = stored(red, icc_profile=broken)
        assert same(shown, np.asarray(red).astype(int), within=0)
    shown, _ = stored(red, icc_profile=swapped(srgb.tobytes()))
    assert (shown[..., 1] > shown[..., 0] + 100).all()


def swapped(profile: bytes) -> bytes:
    """A profile whose red is green: its two tags change places."""
    profile = profile.replace(b"rXYZ", b"!!!!").replace(b"gXYZ", b"rXYZ").replace(b"!!!!", b"gXYZ")
    return profile.replace(b"sRGB", b"ourR").replace("sRGB".encode("utf-16-be"), "ourR".encode("utf-16-be"))


def test_a_turned_picture_is_upright(stored: Any) -> None:
    pixels = np.arange(96, dtype=np.uint8).reshape(4, 8, 3)
    for orientation, wanted in ((3, pixels[::-1, ::-1]), (6, np.rot90(pixels, -1)), (8, np.rot90(pixels))):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for mode in ("RGB", "RGBA"):
            shown, _ = stored(Image.fromarray(pixels).convert(mode), exif=exif)
            assert np.array_equal(shown, wanted)


def test_an_animation_is_its_first_frame_and_says_so(stored: Any, tmp_path: Path) -> None:
    frames = [Image.new("RGBA", (8, 8), colour) for colour in ("#ff000080", "#00ff0080")]
    for suffix in (".png", ".webp", ".gif"):
        shown, said = stored(frames[0], suffix, save_all=True, append_images=frames[1:], lossless=True)
        assert "has several frames, of which the first is shown" in said
        assert (shown[..., 0] == 255).all()
    frames[0].save(tmp_path / "film.png", save_all=True, append_images=frames[1:], duration=500)
    video = open_video(tmp_path / "film.png", 2.0)
    assert [np.asarray(frame)[0, 0].tolist() for frame in video.frames] == [[255, 127, 127], [127, 255, 127]]


def test_a_warning_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "dark.png"
    Image.fromarray((RAMP * 99).astype(np.uint16)).save(path)
    for _ in range(3):
        open_picture(path)
    assert capsys.readouterr().err.count("nearly black") == 1


def test_nothing_is_downloaded() -> None:
    with pytest.raises(CapaError, match="nothing is downloaded"):
        open_picture(Path("https://example.org/a.png"))


def test_bytes_are_a_file_too() -> None:
    buffer = BytesIO()
    Image.new("RGBA", (3, 2), (0, 0, 0, 0)).save(buffer, "PNG")
    assert np.asarray(open_picture(Path("given.png"), buffer.getvalue())).min() == 255


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(CapaError, match=r"x\.png: is no file"):
        open_picture(tmp_path / "x.png")
