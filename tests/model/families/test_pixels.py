"""Pictures of any size stay within bounds, and what is said of their tokens is what the image processor makes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from capa_export.base.errors import CapaError, ExitCode
from capa_export.config.pixels import PixelBounds
from capa_export.model.checkpoint import open_checkpoint
from capa_export.model.families import load_family
from capa_export.model.prompt import Picture, Prompter
from capa_export.model.source import Source
from tests.models import FAMILIES

SIZES = [(56, 56), (3, 3), (640, 480), (29, 500), (1000, 60), (646, 104), (560, 560), (5, 900), (257, 258), (2, 350)]
Bounded = Callable[..., Prompter]


@pytest.fixture(scope="module")
def bounded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bounded:
    """Prompters of a small random model of a family, by their bounds."""
    folder = tmp_path_factory.mktemp(request.param)
    module = FAMILIES[request.param]
    module.save_model(folder, module.random_model())
    source = Source.of(open_checkpoint(str(folder)), load_family(request.param))

    def prompter(**bounds: int) -> Prompter:
        return Prompter(folder, folder, source.family, source.dims, bounds=PixelBounds(**bounds))

    return prompter


every_family = pytest.mark.parametrize("bounded", FAMILIES, indirect=True)


def only(*families: str) -> Any:
    return pytest.mark.parametrize("bounded", families, indirect=True)


def sizes() -> Sequence[tuple[int, int]]:
    """Hand-picked ones, and some of every shape that is allowed."""
    rng = np.random.default_rng(0)
    areas, shapes = rng.uniform(3, 12.5, 60), rng.uniform(-5.2, 5.2, 60)
    drawn = [
        (np.exp((area + shape) / 2), np.exp((area - shape) / 2)) for area, shape in zip(areas, shapes, strict=True)
    ]
    whole = [(max(1, round(width)), max(1, round(height))) for width, height in drawn]
    return [*SIZES, *(size for size in whole if max(size) <= 200 * min(size))]


def shown(prompter: Prompter, size: tuple[int, int]) -> Picture:
    [picture] = prompter("what ?", [Image.new("RGB", size)]).pictures
    return picture


def told(prompter: Prompter, size: tuple[int, int]) -> int:
    return prompter.family.num_tokens(size, prompter.sizes, prompter.bounds, prompter.dims)


@every_family
def test_the_number_of_tokens_is_the_image_processors(bounded: Bounded) -> None:
    for bounds in ({}, {"max_rows": 6, "max_cols": 9, "max_tiles": 4}):
        prompter = bounded(**bounds)
        for size in sizes():
            assert told(prompter, size) == shown(prompter, size).num_tokens, size


@only("qwen25vl", "qwen3vl")
def test_no_picture_has_more_rows_and_columns_than_the_target_takes(bounded: Bounded) -> None:
    free, prompter = bounded(), bounded(max_rows=6, max_cols=9)
    for size in sizes():
        grid = shown(prompter, size).grid
        assert grid is not None
        assert grid[0] <= 6, size
        assert grid[1] <= 9, size
        unbounded = shown(free, size)
        assert unbounded.grid is not None
        if unbounded.grid[0] <= 6 and unbounded.grid[1] <= 9:
            # What fits anyway is seen as ever, to the last bit.
            assert np.array_equal(unbounded.patches, shown(prompter, size).patches)


@only("qwen25vl", "qwen3vl")
def test_pixels_bound_the_area(bounded: Bounded) -> None:
    prompter = bounded(max_pixels=40_000)
    unit = prompter.dims.vision.patch_size * prompter.dims.vision.spatial_merge_size
    assert shown(prompter, (6000, 4000)).num_tokens * unit**2 <= 40_000
    assert shown(prompter, (6000, 4000)).num_tokens * unit**2 > 20_000
    least = bounded(min_pixels=40_000)
    assert shown(least, (30, 30)).num_tokens * unit**2 >= 40_000
    assert shown(bounded(), (30, 30)).num_tokens * unit**2 < 40_000
    both = bounded(min_pixels=30_000, max_pixels=40_000, max_rows=20, max_cols=20)
    for size in ((30, 30), (600, 600), (400, 300)):
        assert 30_000 <= shown(both, size).num_tokens * unit**2 <= 40_000


@only("internvl3")
def test_pixels_bound_the_tiles(bounded: Bounded) -> None:
    side = bounded().dims.vision.image_size
    large = (8 * side, 6 * side)
    assert len(shown(bounded(), large).patches) == 13
    assert len(shown(bounded(max_pixels=4 * side**2), large).patches) <= 5
    assert len(shown(bounded(max_pixels=side**2), large).patches) == 1
    assert len(shown(bounded(max_tiles=1), large).patches) == 1
    assert len(shown(bounded(max_tiles=7), large).patches) <= 7
    assert len(shown(bounded(min_pixels=4 * side**2), (side, side)).patches) >= 5


@pytest.mark.parametrize(
    ("bounded", "bounds", "problem"),
    [
        ("llava15", {"max_pixels": 9999}, r"--max-pixels 9999: this model sees every picture at 56 x 56 pixels; drop"),
        ("llava15", {"min_pixels": 9}, r"--min-pixels 9: this model sees every picture at"),
        ("internvl3", {"max_pixels": 9}, r"--max-pixels 9: this model sees at least one tile of .*; give \d+ or more"),
        ("internvl3", {"min_pixels": 10**9}, r"--min-pixels 1000000000: .* at most 12 tiles .*; give --max-pixels"),
        ("internvl3", {"max_pixels": 10**6, "max_tiles": 4}, r"--max-pixels 1000000: the target takes 4 tiles"),
        ("qwen25vl", {"max_pixels": 9}, r"--max-pixels 9: one visual token is 28 x 28 pixels; give 784 or more"),
        ("qwen25vl", {"min_pixels": 10**9}, r"--min-pixels 1000000000: .* at most \d+ pixels; give --max-pixels"),
        (
            "internvl3",
            {"min_pixels": 20_000, "max_tiles": 4},
            r"wider limits; where no engine runs, --max-pixels lifts",
        ),
        (
            "qwen25vl",
            {"min_pixels": 10**6, "max_rows": 6, "max_cols": 9},
            r"wider limits; where no engine runs, --max-",
        ),
        (
            "qwen25vl",
            {"max_pixels": 10**6, "max_rows": 6, "max_cols": 9},
            "takes 6 x 9 visual tokens .*; give 42336 or less, or a target with wider limits$",
        ),
    ],
    indirect=["bounded"],
)
def test_bounds_that_cannot_be_kept_are_refused(bounded: Bounded, bounds: dict[str, int], problem: str) -> None:
    with pytest.raises(CapaError, match=problem) as caught:
        bounded(**bounds)
    assert caught.value.code == ExitCode.USAGE


@only("qwen25vl")
def test_a_processor_that_does_not_resize_takes_no_bounds(bounded: Bounded, tmp_path: Path) -> None:
    prompter = bounded()
    prompter.image_processor.do_resize = False
    prompter.image_processor.save_pretrained(tmp_path)
    prompter.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(CapaError, match="does not resize"):
        Prompter(tmp_path, tmp_path, prompter.family, prompter.dims, bounds=PixelBounds(max_pixels=9999))
    limits = PixelBounds(max_rows=6, max_cols=9)
    as_it_is = Prompter(tmp_path, tmp_path, prompter.family, prompter.dims, bounds=limits)
    assert told(as_it_is, (560, 280)) == shown(as_it_is, (560, 280)).num_tokens == 200


def test_bounds_in_the_wrong_order() -> None:
    with pytest.raises(ValueError, match="min_pixels 2 is above max_pixels 1"):
        PixelBounds(min_pixels=2, max_pixels=1)
    for given, problem in (((0, None), "--min-pixels 0: must be above 0"), ((9, 8), "--min-pixels 9 is above")):
        with pytest.raises(CapaError, match=problem):
            PixelBounds().with_options(*given)
