"""Whole prompts of every family, by what a bundle keeps and by transformers: the same to the last bit."""

from dataclasses import astuple
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from capa_export.base.errors import CapaError
from capa_export.model.checkpoint import open_checkpoint
from capa_export.model.families import VideoFamily, load_family
from capa_export.model.processors.resolved import read_processors, write_processors
from capa_export.model.prompt import Prompter, Turn, Video
from capa_export.model.source import Source
from tests.conftest import noise
from tests.models import FAMILIES

if TYPE_CHECKING:
    from PIL import Image

SIZES = [(56, 56), (300, 97), (57, 400), (1, 3)]


@pytest.fixture(scope="module", params=FAMILIES)
def prompters(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Prompter, Prompter]:
    """As transformers loads the checkpoint, and as the bundle keeps it."""
    made, folder = FAMILIES[request.param], tmp_path_factory.mktemp(request.param)
    made.save_model(folder, made.random_model())
    family = load_family(request.param)
    dims = Source.of(open_checkpoint(str(folder)), family).dims
    theirs = Prompter(folder, folder, family, dims)
    assert write_processors(theirs.tokenizer, theirs.image_processor, folder / "kept") is None
    return theirs, Prompter(folder, folder, family, dims, processors=read_processors(folder / "kept"))


def conversations(prompter: Prompter) -> list[list[Turn]]:
    seen: list[Image.Image] = [noise(*size, seed) for seed, size in enumerate(SIZES)]
    videos: list[Any] = []
    if isinstance(prompter.family, VideoFamily):
        videos = [Video([noise(84, 120, seed) for seed in range(count)], 2.0) for count in (1, 2, 5)]
    return [
        [Turn("user", ["what color is the star ?"])],
        [Turn("user", [seen[0], "what color is the star ?"])],
        [Turn("user", [*seen, "what ?"]), Turn("assistant", ["red"]), Turn("user", ["and ", seen[1], " ?"])],
        *([Turn("user", [video, seen[0], "what ?"])] for video in videos),
    ]


def outcome(prompter: Prompter, turns: list[Turn]) -> Any:
    try:
        prompt = prompter.chat(turns)
    except CapaError as error:
        return str(error)
    return [
        *(prompt.input_ids, prompt.is_visual, prompt.position_ids, np.array(prompt.next_position)),
        *(value for picture in prompt.pictures for value in astuple(picture)),
    ]


def test_prompts_are_the_same(prompters: tuple[Prompter, Prompter]) -> None:
    theirs, own = prompters
    assert own.marks == theirs.marks
    made = 0
    for turns in conversations(theirs):
        expected, found = outcome(theirs, turns), outcome(own, turns)
        if isinstance(expected, str):
            assert isinstance(found, str)
            continue
        made += 1
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_array_equal(a, b, strict=isinstance(b, np.ndarray))
    assert made >= 2


def test_answers_are_the_same(prompters: tuple[Prompter, Prompter]) -> None:
    theirs, own = prompters
    chosen = np.random.default_rng(0).integers(len(theirs.tokenizer), size=(20, 9))
    for tokens in chosen.tolist():
        assert own.decode(tokens) == theirs.decode(tokens)
