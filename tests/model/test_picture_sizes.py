"""Sizes are those of transformers, to the pixel."""

from itertools import product

import numpy as np
import pytest
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from capa_export.model.picture_sizes import sides_within, tile_grid

SIDES = [
    (28, 28),
    (1, 199),
    (13, 15),
    (1080, 1920),
    (4000, 3000),
    *np.random.default_rng(1).integers(20, 3000, (200, 2)).tolist(),
]


@pytest.mark.parametrize(("least", "most"), [(56 * 56, 14 * 14 * 4 * 1280), (256 * 28 * 28, 257 * 28 * 28)])
def test_sides_are_those_of_smart_resize(least: int, most: int) -> None:
    for height, width in SIDES:
        rows, cols = sides_within((height, width), 28, least, most)
        wanted = smart_resize(height, width, factor=28, min_pixels=least, max_pixels=most)
        assert (28 * rows, 28 * cols) == tuple(wanted), (height, width)


@pytest.mark.parametrize(("fewest", "most"), [(1, 12), (2, 6), (1, 1)])
def test_tiles_are_those_of_the_tiled_canvas(fewest: int, most: int) -> None:
    for height, width in SIDES:
        wanted = get_optimal_tiled_canvas((height, width), (448, 448), fewest, most)
        assert tile_grid(width, height, 448 * 448, fewest, most) == tuple(wanted), (height, width)


def test_areas_stay_within_bounds() -> None:
    for height, width in product((60, 444, 3100), repeat=2):
        rows, cols = sides_within((height, width), 28, 64 * 784, 256 * 784)
        assert 64 <= rows * cols <= 256
