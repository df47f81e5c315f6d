"""Colours for amounts: cividis, which rises in brightness alike for all eyes and in print."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from capa_export.report.pictures import fitted

__all__ = ["ColorScale", "heat", "legend", "mark_sinks"]

_CIVIDIS = np.array(
    [
        (0, 34, 78),
        (18, 53, 112),
        (59, 73, 108),
        (87, 93, 109),
        (112, 113, 115),
        (138, 134, 120),
        (165, 156, 116),
        (195, 179, 105),
        (225, 204, 85),
        (254, 232, 56),
    ]
)
_OPACITY = 0.8
"""Opacity of the colours over the picture, which only has to be recognised."""


@dataclass(frozen=True)
class ColorScale:
    """A logarithmic scale: contributions and attention span decades."""

    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float | None]) -> "ColorScale":
        """A scale from the least value above 0 to the largest."""
        positive = [value for value in values if value]
        return cls(min(positive, default=1.0), max(positive, default=1.0))

    @property
    def middle(self) -> float:
        return float(np.sqrt(self.low * self.high))

    def share(self, value: float | None) -> float:
        """The place of a value on the scale, 0 to 1; 0, negative and missing values lie at the lower end."""
        if not value or value <= self.low or self.high <= self.low:
            return 0.0
        return float(min(1.0, np.log(value / self.low) / np.log(self.high / self.low)))


def heat(picture: Image.Image, rows: int, cols: int, shares: Sequence[float]) -> Image.Image:
    """Paint a picture in grey under colours.

    Args:
        picture: as the user gave it.
        rows: of the grid of visual tokens that lies over it.
        cols: of that grid.
        shares: one of [0, 1] for each of them, row by row.
    """
    picture = fitted(picture)
    cells = Image.fromarray(_colors(np.asarray(shares).reshape(rows, cols)))
    grey = ImageOps.grayscale(picture).convert("RGB")
    return Image.blend(grey, cells.resize(picture.size, Image.Resampling.NEAREST), _OPACITY)


def legend() -> Image.Image:
    """A bar of the colours, from the least to the most."""
    return Image.fromarray(_colors(np.tile(np.linspace(0, 1, 256), (8, 1))))


def mark_sinks(
    picture: Image.Image, rows: int, cols: int, dumps: Collection[int], anchors: Collection[int]
) -> Image.Image:
    """Paint a picture in pale grey, a cross on each dump and a ring around each anchor."""
    picture = fitted(picture)
    grey = ImageOps.grayscale(picture).convert("RGB")
    shown = Image.blend(grey, Image.new("RGB", picture.size, "white"), 0.5)
    draw = ImageDraw.Draw(shown)
    width, height = picture.width / cols, picture.height / rows
    reach = max(3.0, 0.4 * min(width, height))
    for tokens, is_dump in ((dumps, True), (anchors, False)):
        for row, col in (divmod(token, cols) for token in tokens):
            x, y = (col + 0.5) * width, (row + 0.5) * height
            if is_dump:
                for slope in (-reach, reach):
                    draw.line((x - reach, y - slope, x + reach, y + slope), fill=(179, 38, 30), width=3)
            else:
                draw.ellipse((x - reach, y - reach, x + reach, y + reach), outline=(27, 115, 64), width=3)
    return shown


def _colors(shares: np.ndarray) -> np.ndarray:
    """Colours [..., 3] uint8 of shares [...]."""
    stops = np.linspace(0, 1, len(_CIVIDIS))
    return np.stack([np.interp(shares, stops, channel) for channel in _CIVIDIS.T], axis=-1).round().astype(np.uint8)
