"""The model that ships with the project: small, loadable like any other, and it sees."""

import json
from pathlib import Path

import pytest

from capa_export.checkpoint import open_checkpoint
from capa_export.recipe import load_recipe
from capa_export.testbed.evaluate import Asker
from capa_export.testbed.scenes import KINDS, samples


@pytest.fixture(scope="module")
def folder() -> Path:
    return Path(load_recipe("tiny-qwen25vl").checkpoint)


def test_it_is_small_and_whole(folder: Path) -> None:
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.nbytes <= 15e6
    assert checkpoint.config["architectures"] == ["Qwen2_5_VLForConditionalGeneration"]


def test_the_published_evaluation_reaches_the_bar(folder: Path) -> None:
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert set(evaluation) == set(KINDS)
    assert min(evaluation.values()) >= 0.95


@pytest.mark.parametrize("kind", KINDS)
def test_it_answers_pictures_it_never_saw(folder: Path, kind: str) -> None:
    asker = Asker(folder)
    asked = list(samples(30, seed=77, kinds=[kind], split="held_out"))
    right = sum(asker.answer(sample) == f"{sample.answer} <|im_end|>" for sample in asked)
    # 28 of 30: a model at the 95 % bar falls below that in one run of five, ours at 100 % in none seen.
    assert right >= 28
