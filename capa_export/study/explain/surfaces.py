"""The places of visual tokens, and the pixels under them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from capa_export.model.prompt import Picture, Prompt
from capa_export.study.explain.schema import Grid

__all__ = ["Surface", "surfaces_of"]


@dataclass(frozen=True)
class Surface:
    """A grid of visual tokens over a picture, or over a tile of it."""

    image: Image.Image
    grid: Grid

    @property
    def tokens(self) -> range:
        """Visual tokens on the surface, row by row."""
        return range(self.grid.first, self.grid.first + self.grid.rows * self.grid.cols)

    def cells(self, tokens: Sequence[int]) -> list[int]:
        """The grid cells of those of some visual tokens that lie here."""
        return [token - self.grid.first for token in tokens if token in self.tokens]

    @property
    def name(self) -> str:
        tile = "" if self.grid.tile is None else f", tile {self.grid.tile + 1}"
        return f"picture {self.grid.picture + 1}{tile}"


def surfaces_of(prompt: Prompt, images: Sequence[Image.Image], image_processor: Any) -> list[Surface]:
    """The surfaces of all pictures in order; a picture whose tokens make no grid has none."""
    found: list[Surface] = []
    first = 0
    for index, (picture, image) in enumerate(zip(prompt.pictures, images, strict=True)):
        if picture.grid is not None:
            rows, cols = picture.grid
            side = min(image.size)
            seen = ImageOps.fit(image, (side, side)) if picture.square else image
            found.append(Surface(seen, Grid(picture=index, first=first, rows=rows, cols=cols)))
        elif picture.tile is not None:
            rows, cols = picture.tile
            for tile, pixels in enumerate(_tiles(picture, image_processor)):
                start = first + tile * rows * cols
                found.append(Surface(pixels, Grid(picture=index, tile=tile, first=start, rows=rows, cols=cols)))
        first += picture.num_tokens
    return found


def _tiles(picture: Picture, image_processor: Any) -> Iterator[Image.Image]:
    """Yield the tiles as the vision tower sees them: how the image processor cut the picture up is not said."""
    mean, std = (
        np.asarray(values)[:, None, None] for values in (image_processor.image_mean, image_processor.image_std)
    )
    for tile_CHW in picture.patches:
        pixels = ((tile_CHW * std + mean) * 255).round().clip(0, 255).astype(np.uint8)
        yield Image.fromarray(pixels.transpose(1, 2, 0))
