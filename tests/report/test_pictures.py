"""Kept tokens show the picture, dropped ones are dimmed, and an outline goes around what is kept."""

from base64 import b64decode
from io import BytesIO

import numpy as np
from PIL import Image

from capa_export.report.pictures import data_uri, fitted, overlay

ORANGE = (255, 176, 0)


def test_pictures_are_as_large_as_the_page_shows_them() -> None:
    assert fitted(Image.new("L", (1000, 500))).size == (384, 192)
    assert fitted(Image.new("RGBA", (10, 20))).size == (192, 384)
    assert fitted(Image.new("RGB", (1000, 1))).size == (384, 1)
    assert fitted(Image.new("L", (3, 3))).mode == "RGB"


def test_a_kept_token_shows_the_picture_within_its_outline() -> None:
    """Of a grid of 2 x 4, the second of the first row and its neighbour below."""
    red = Image.new("RGB", (384, 192), (255, 0, 0))
    shown = np.asarray(overlay(red, 2, 4, [1, 5]))
    kept = shown[:, 96:192]
    assert (kept[2:-2, 2:-2] == (255, 0, 0)).all()
    # No line between the two.
    assert (shown[95:97, 100:188] == (255, 0, 0)).all()
    for edge in (kept[:2], kept[-2:], kept[:, :2], kept[:, -2:]):
        assert (edge == ORANGE).all()
    dropped = np.concatenate([shown[:, :96], shown[:, 192:]], axis=1)
    assert (dropped == dropped[0, 0]).all() and dropped.max() < 128


def test_nothing_kept_and_all_kept() -> None:
    red = Image.new("RGB", (384, 192), (255, 0, 0))
    assert not (np.asarray(overlay(red, 2, 4, [])) == ORANGE).all(axis=-1).any()
    assert (np.asarray(overlay(red, 2, 4, range(8)))[2:-2, 2:-2] == (255, 0, 0)).all()


def shown(picture: Image.Image) -> Image.Image:
    """What a page shows of a picture."""
    kind, _, data = data_uri(picture).partition(",")
    again = Image.open(BytesIO(b64decode(data)))
    assert (kind, again.format, again.size) == ("data:image/png;base64", "PNG", picture.size)
    return again.convert("RGB")


def test_a_drawing_stands_in_the_page_as_it_is() -> None:
    assert shown(Image.new("RGB", (20, 10), (1, 2, 3))).getpixel((3, 3)) == (1, 2, 3)


def test_a_photograph_stands_in_the_page_nearly_as_it_is() -> None:
    """A colour of the palette stands for those of a cube whose sides are 16 of 255."""
    ramps = [Image.linear_gradient("L").rotate(angle).resize((140, 84)) for angle in (0, 90)]
    photograph = Image.merge("RGB", (*ramps, Image.new("L", (140, 84), 99)))
    assert len(photograph.getcolors(1 << 20) or ()) > 5000
    error = np.asarray(shown(photograph), np.float32) - np.asarray(photograph)
    assert np.abs(error).max() <= 8
