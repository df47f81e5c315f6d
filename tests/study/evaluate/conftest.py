"""Scenes in a folder, as users have pictures and questions, and datasets in the layouts of the benchmarks."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from capa_export.config.recipe import Recipe, load_recipe
from capa_export.data.questions import questions_from
from capa_export.data.scenes import samples
from capa_export.study.evaluate.schema import Evaluation
from capa_export.study.evaluate.stage import evaluate
from tests.conftest import noise
from tests.study.evaluate.asking import building_of, evaluated_model


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .jsonl file of twelve questions that the shipped models can answer."""
    folder = tmp_path_factory.mktemp("scenes")
    rows: list[dict[str, Any]] = []
    for index, sample in enumerate(samples(12, seed=5)):
        sample.image.save(folder / f"{index}.png")
        rows.append(
            {"image": f"{index}.png", "question": sample.question, "answer": sample.answer, "kind": sample.kind}
        )
    path = folder / "questions.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    """The shipped one, made small; random weights are linear nowhere near 0.96."""
    data = load_recipe("qwen25vl").model_dump()
    data["prune"] = {"schedule": [{"layer": 2, "ratio": 0.75}]}
    return Recipe(**{**data, "ffn": {"eta": 0.5, "budget": 100}})


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the random model, which knows no answer; there are nine."""
    folder = tmp_path_factory.mktemp("questions")
    rows: list[dict[str, Any]] = []
    for index in range(9):
        noise(112, 84 + 28 * (index % 2), index).save(folder / f"{index}.png")
        rows.append({"image": f"{index}.png", "question": "what is it ?", "answer": "star", "id": f"q{index}"})
    path = folder / "q.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def calibrated(recipe: Recipe, checkpoint: Path, questions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a calibration in it."""
    out = tmp_path_factory.mktemp("calibrated")
    building_of(recipe, checkpoint, out, images=questions.parent, samples=3).calibrate()
    return out / "calibration"


@pytest.fixture(scope="session")
def alone(
    recipe: Recipe, checkpoint: Path, questions: Path, calibrated: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Evaluation]:
    """What one process finds."""
    out = tmp_path_factory.mktemp("alone")
    evaluated = evaluated_model(building_of(recipe, checkpoint, out, calibration=calibrated))
    return out, evaluate(evaluated, questions_from(questions), out)
