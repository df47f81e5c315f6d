"""Draws kept and dropped visual tokens over a picture."""

from base64 import b64encode
from collections.abc import Collection
from io import BytesIO

from PIL import Image, ImageDraw, ImageOps

__all__ = ["SIDE", "data_uri", "fitted", "overlay"]

SIDE = 384
"""Longer side of a picture among others, in pixels."""
_SHADE, _OUTLINE = (40, 42, 46), (255, 176, 0)


def fitted(picture: Image.Image, side: int = SIDE) -> Image.Image:
    """A picture in RGB, its longer side of so many pixels."""
    scale = side / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)


def overlay(picture: Image.Image, rows: int, cols: int, kept: Collection[int], side: int = SIDE) -> Image.Image:
    """A picture with dropped tokens dimmed and a line around the kept ones.

    Args:
        picture: the picture as the user gave it.
        rows: rows of the grid of visual tokens that lies over it.
        cols: columns of that grid.
        kept: indices in row-major order of the grid.
        side: longer one of the result, in pixels.
    """
    picture = fitted(picture, side)
    width, height = picture.size
    grey = ImageOps.grayscale(picture).convert("RGB")
    shown = Image.blend(grey, Image.new("RGB", picture.size, _SHADE), 0.55)
    xs = [round(col * width / cols) for col in range(cols + 1)]
    ys = [round(row * height / rows) for row in range(rows + 1)]
    cells = {divmod(index, cols) for index in kept}
    for row, col in cells:
        shown.paste(picture.crop(box := (xs[col], ys[row], xs[col + 1], ys[row + 1])), box)
    draw = ImageDraw.Draw(shown)
    more = int(min(width / cols, height / rows) >= 16)
    for row, col in sorted(cells):
        left, top, right, bottom = xs[col], ys[row], xs[col + 1] - 1, ys[row + 1] - 1
        edges = {
            (row - 1, col): (left, top, right, top + more),
            (row + 1, col): (left, bottom - more, right, bottom),
            (row, col - 1): (left, top, left + more, bottom),
            (row, col + 1): (right - more, top, right, bottom),
        }
        for neighbour, edge in edges.items():
            if neighbour not in cells:
                draw.rectangle(edge, fill=_OUTLINE)
    return shown


def data_uri(picture: Image.Image) -> str:
    """A picture as the `data:` address of a PNG, to stand in the page itself."""
    # 256 colours take a third of the bytes. A median cut keeps a drawing's, and takes a second over a photograph's.
    method = Image.Quantize.MEDIANCUT if picture.getcolors(256) else Image.Quantize.FASTOCTREE
    picture.quantize(256, method).save(data := BytesIO(), "PNG", optimize=True)
    return f"data:image/png;base64,{b64encode(data.getvalue()).decode()}"
