"""The sizes of pictures in the image processors of transformers: the rounding of an area, and the tiling.

Whoever processes a picture and whoever counts its visual tokens beforehand must agree to the pixel.
"""

from itertools import product
from math import ceil, floor, sqrt

__all__ = ["sides_within", "tile_grid"]


def sides_within(sides: tuple[int, int], unit: int, least: int, most: int) -> tuple[int, int]:
    """Two sides in units, near their own ratio, with an area between two bounds: transformers' `smart_resize`.

    Args:
        sides: in pixels.
        unit: pixels that each side is a multiple of afterwards.
        least: pixels of the smallest area.
        most: pixels of the largest area.
    """
    first, second = (round(side / unit) for side in sides)
    pixels = sides[0] * sides[1]
    if first * second * unit**2 > most:
        shrink = sqrt(pixels / most)
        first, second = (max(1, floor(side / shrink / unit)) for side in sides)
    elif first * second * unit**2 < least:
        grow = sqrt(least / pixels)
        first, second = (ceil(side * grow / unit) for side in sides)
    return first, second


def tile_grid(width: int, height: int, tile_pixels: int, fewest: int, most: int) -> tuple[int, int]:
    """Columns and rows of the tiles nearest to a picture's shape: transformers' `get_optimal_tiled_canvas`.

    Of two that are as near the larger is taken, if the picture fills more than half of it.

    Args:
        width: of the picture.
        height: of the picture.
        tile_pixels: area of a tile.
        fewest: tiles at least.
        most: tiles at most.
    """
    numbers = range(1, most + 1)
    grids = [grid for grid in product(numbers, numbers) if fewest <= grid[0] * grid[1] <= most]
    best, nearest = (1, 1), float("inf")
    for cols, rows in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        distance = abs(width / height - cols / rows)
        if distance < nearest or (distance == nearest and width * height > 0.5 * tile_pixels * cols * rows):
            best, nearest = (cols, rows), distance
    return best
