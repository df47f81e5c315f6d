"""Where the tokens of pictures of every kind lie."""

from types import SimpleNamespace

import numpy as np
from PIL import Image

from capa_export.model.prompt import Picture, Prompt
from capa_export.study.explain.surfaces import surfaces_of

PROCESSOR = SimpleNamespace(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4])
EMPTY = np.zeros((1, 3, 4, 4), np.float32)


def prompt_of(*pictures: Picture) -> Prompt:
    count = sum(picture.num_tokens for picture in pictures)
    ids = np.zeros(count, np.int64)
    return Prompt(ids, np.ones(count, bool), pictures, ids[None], count)


def test_grids_squares_tiles_and_none_of_them() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 4, 4))
    mean, std = (np.asarray(values)[:, None, None] for values in (PROCESSOR.image_mean, PROCESSOR.image_std))
    tiles = ((pixels / 255 - mean) / std).astype(np.float32)
    wide = Image.new("RGB", (90, 30), "red")
    wide.paste("white", (30, 0, 60, 30))
    surfaces = surfaces_of(
        prompt_of(
            Picture(EMPTY, num_tokens=6, grid=(2, 3)),
            Picture(EMPTY, num_tokens=5),
            Picture(tiles, num_tokens=12, tile=(2, 2)),
            Picture(EMPTY, num_tokens=4, grid=(2, 2), tile=(2, 2), square=True),
        ),
        [wide] * 4,
        PROCESSOR,
    )
    assert [(surface.name, surface.tokens) for surface in surfaces] == [
        ("picture 1", range(6)),
        ("picture 3, tile 1", range(11, 15)),
        ("picture 3, tile 2", range(15, 19)),
        ("picture 3, tile 3", range(19, 23)),
        ("picture 4", range(23, 27)),
    ]
    assert surfaces[0].image.size == (90, 30)
    for surface, tile in zip(surfaces[1:4], pixels, strict=True):
        assert (np.asarray(surface.image).transpose(2, 0, 1) == tile).all()
    assert surfaces[4].image.size == (30, 30)
    assert np.asarray(surfaces[4].image)[:, 5:25].min() == 255, "nothing of the red beside it"
    assert surfaces[2].cells([3, 15, 18, 19]) == [0, 3]
