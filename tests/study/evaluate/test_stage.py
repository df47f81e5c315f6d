"""Evaluation from end to end: what is asked, what is not asked again, and what is refused."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from capa_export.base.errors import CapaError
from capa_export.base.statistics import kl_divergence
from capa_export.base.workers import Workers
from capa_export.config.recipe import Recipe, load_recipe
from capa_export.data.conversation import conversations
from capa_export.data.questions import questions_from
from capa_export.model.eager import Eager
from capa_export.model.eager_plan import EagerPlan, inputs_for
from capa_export.model.families import qwen25vl
from capa_export.selectors import attention
from capa_export.study.evaluate import answers as answers_module
from capa_export.study.evaluate.models import parse_methods
from capa_export.study.evaluate.results import ANSWERS
from capa_export.study.evaluate.schema import Evaluation
from capa_export.study.evaluate.stage import EVALUATION, evaluate
from tests.study.evaluate.asking import METHODS, building_of, evaluated_model, rows_of


def test_the_trained_model_answers(scenes: Path, tmp_path: Path) -> None:
    """CAPA at half the tokens costs nothing here, and nearly none left costs much."""
    recipe = load_recipe("tiny-qwen25vl")
    building = building_of(recipe, Path(recipe.checkpoint), tmp_path)
    evaluated = evaluated_model(building, ["capa@2:0.5/full", "attention@0:0.98/full"])
    found = evaluate(evaluated, questions_from(scenes), tmp_path)
    dense, capa, few = found.methods
    assert (found.questions, found.answered, found.skipped, found.metric) == (12, 12, (), "exact")
    assert dense.score is not None and dense.score.value == 1
    assert capa.score is not None and capa.score.value == 1
    assert few.to_dense is not None and few.to_dense.value < 0
    assert few.score is not None and few.to_dense.value == pytest.approx(few.score.value - 1)
    assert few.to_first == few.to_dense
    assert capa.to_first is None and dense.to_dense is None
    assert capa.kl is not None and few.kl is not None and 0 < capa.kl < few.kl
    assert (dense.kept, capa.kept) == (1, 0.5)
    assert set(dense.kinds) == {"color_of", "shape_of", "exists", "same"}
    assert json.loads((tmp_path / EVALUATION).read_text())["methods"][0]["method"] == "dense"


def test_answers_are_the_eager_models(
    recipe: Recipe, model: Any, prompter: Any, questions: Path, alone: tuple[Path, Evaluation]
) -> None:
    """Of the first question, worked out by hand."""
    prompt = prompter.chat(conversations("what is it ?", [questions.parent / "0.png"])[0])
    is_visual = torch.from_numpy(prompt.is_visual)
    eager = Eager(model)
    keep = recipe.prune.num_keep(prompt.image_lengths)[0]
    scales = {row["answer"]["method"]: row for row in rows_of(alone[0]) if row["question"] == "q0"}
    plan = EagerPlan(
        keep={1: max(1, int(np.ceil(prompt.num_visual * 0.1)))},
        selectors={1: parse_methods(METHODS)[METHODS[1]].stages[0].chosen},
        min_keep_per_image=recipe.prune.min_keep_per_image,
    )
    inputs = inputs_for(plan, qwen25vl, model, prompt)
    dense, pruned = (eager.prefill(inputs, is_visual, plan) for plan in (EagerPlan(), plan))
    found = scales[METHODS[1]]["answer"]
    assert found["kl"] == pytest.approx(kl_divergence(dense.logits, pruned.logits), rel=1e-4)
    assert found["kept"] == plan.keep[1]
    assert scales[METHODS[0]]["answer"]["kept"] == keep
    token = int(dense.logits.argmax())
    assert scales["dense"]["answer"]["text"].startswith(prompter.decode([token]).strip())


@pytest.mark.parametrize("ffn", ["scale", "skip", "per-image", "eta=0.01"])
def test_visual_ffns(
    ffn: str, recipe: Recipe, checkpoint: Path, questions: Path, calibrated: Path, tmp_path: Path
) -> None:
    building = building_of(recipe, checkpoint, tmp_path, calibration=calibrated)
    evaluated = evaluated_model(building, ["dense/full", f"dense/{ffn}"])
    found = evaluate(evaluated, questions_from(questions, limit=2), tmp_path)
    assert [method.kl == 0 for method in found.methods[1:]] == [True, False]
    assert len(set(evaluated.keys.values())) == 2


def test_what_is_there_is_not_asked_again(
    recipe: Recipe, checkpoint: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(methods: Sequence[str], **options: Any) -> Evaluation:
        evaluated = evaluated_model(building_of(recipe, checkpoint, tmp_path), methods, **options)
        return evaluate(evaluated, questions_from(questions), tmp_path)

    run(["capa@2:0.75/full"])
    first = (tmp_path / ANSWERS).read_text()
    # The last line had no time to be ended, and one answer of another question is lost.
    lines = first.splitlines(keepends=True)
    (tmp_path / ANSWERS).write_text("".join([*lines[:5], *lines[6:-1], lines[-1][:30]]))
    asked: list[tuple[str, Sequence[str]]] = []
    plain = answers_module.answerer

    def noted(answers: Any) -> Any:
        def note(question: Any, wanted: Sequence[str]) -> Any:
            asked.append((question.id, wanted))
            return answers(question, wanted)

        return plain(note)

    monkeypatch.setattr("capa_export.study.evaluate.eager_answers.answerer", noted)
    found = run(["capa@2:0.75/full"])
    assert asked == [("q2", ["dense"]), ("q8", ["capa@2:0.75/full"])]
    assert sorted(first.splitlines()) == sorted((tmp_path / ANSWERS).read_text().splitlines())
    asked.clear()
    assert run(["capa@2:0.75/full"]) == found
    assert not asked
    more = run(["capa@2:0.750/full", "capa@2:0.5/full"])
    assert {tuple(wanted) for _, wanted in asked} == {("capa@2:0.5/full",)}, (
        "the same method in other words is the same"
    )
    assert more.methods[1].model_copy(update={"method": "capa@2:0.75/full", "to_first": None}) == found.methods[1]
    asked.clear()
    run(["capa@2:0.75/full"], max_new_tokens=2)
    assert {tuple(wanted) for _, wanted in asked} == {("dense", "capa@2:0.75/full")}, "settings do not mix"


def test_another_model_is_refused(
    recipe: Recipe, checkpoint: Path, questions: Path, alone: tuple[Path, Evaluation], tmp_path: Path
) -> None:
    other = shutil.copytree(checkpoint, tmp_path / "other")
    processor = other / "preprocessor_config.json"
    processor.write_text(json.dumps({**json.loads(processor.read_text()), "image_mean": [0.0, 0.0, 0.0]}))
    evaluated = evaluated_model(building_of(recipe, other, tmp_path), ["capa@2:0.75/full"])
    with pytest.raises(CapaError, match=r"holds answers of another model, .*checkpoint0; choose another --out"):
        evaluate(evaluated, questions_from(questions), alone[0])


@pytest.mark.parametrize("line", ["{", "[]", '{"key": "x"}', '{"key": "x", "answer": {"method": "dense"}}'])
def test_a_damaged_line_is_named(
    line: str, alone: tuple[Path, Evaluation], recipe: Recipe, checkpoint: Path, questions: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(alone[0], tmp_path / "out")
    with (out / ANSWERS).open("a") as file:
        file.write(f"{line}\n")
    evaluated = evaluated_model(building_of(recipe, checkpoint, out), ["capa@2:0.75/full"])
    with pytest.raises(CapaError, match=r"answers.jsonl: line 29 is damaged"):
        evaluate(evaluated, questions_from(questions), out)


def test_figures_that_cannot_be_written_are_one_line(
    alone: tuple[Path, Evaluation], recipe: Recipe, checkpoint: Path, questions: Path, calibrated: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(alone[0], tmp_path / "out")
    (out / EVALUATION).unlink()
    (out / EVALUATION).mkdir()
    evaluated = evaluated_model(building_of(recipe, checkpoint, out, calibration=calibrated))
    with pytest.raises(CapaError, match=r"evaluation.json: Is a directory; make room for it"):
        evaluate(evaluated, questions_from(questions), out)
    (out / EVALUATION).rmdir()
    assert evaluate(evaluated, questions_from(questions), out) == alone[1]


@pytest.mark.slow
@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.exhaustive)])
def test_processes_find_the_same(
    request: pytest.FixtureRequest,
    start: str,
    recipe: Recipe,
    checkpoint: Path,
    questions: Path,
    calibrated: Path,
    alone: tuple[Path, Evaluation],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where they begin as a user's do, which takes them a while."""
    if start == "fork":
        request.getfixturevalue("forked_workers")
    # With other threads, sums may be taken in another order.
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    workers = Workers(count=2)
    evaluated = evaluated_model(building_of(recipe, checkpoint, tmp_path, calibration=calibrated, workers=workers))
    found = evaluate(evaluated, questions_from(questions), tmp_path, workers=workers)
    assert rows_of(tmp_path) == rows_of(alone[0])
    assert found == alone[1]


@pytest.mark.exhaustive
def test_a_cluster_that_loses_a_node_finds_the_same(
    recipe: Recipe,
    checkpoint: Path,
    questions: Path,
    calibrated: Path,
    alone: tuple[Path, Evaluation],
    two_nodes: tuple[Any, Any],
    tmp_path: Path,
) -> None:
    cluster, second = two_nodes
    workers = Workers(ray=cluster.address)
    evaluated = evaluated_model(building_of(recipe, checkpoint, tmp_path, calibration=calibrated, workers=workers))
    through: list[int] = []

    def lose_a_node(_what: str, done: int, _total: int) -> None:
        through.append(done)
        if done == 4:
            cluster.remove_node(second, allow_graceful=False)

    found = evaluate(evaluated, questions_from(questions), tmp_path, workers=workers, report=lose_a_node)
    assert through == list(range(10))
    assert rows_of(tmp_path) == rows_of(alone[0]), "nothing is lost, and nothing there twice"
    assert found == alone[1]


@pytest.mark.slow
@pytest.mark.usefixtures("forked_workers")
def test_calibrations_are_the_same_to_the_bit(
    recipe: Recipe, checkpoint: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    options: dict[str, Any] = {"images": questions.parent, "samples": 9}
    one, two = (
        building_of(recipe, checkpoint, tmp_path / f"{count}", **options, workers=Workers(count=count)).calibrate()
        for count in (1, 2)
    )
    assert one.samples == two.samples == 9
    assert one.digest() == two.digest()


def test_a_ratio_that_leaves_too_few_is_a_row_that_cannot_be_asked(
    recipe: Recipe, checkpoint: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of small pictures alone: others have tokens enough."""
    monkeypatch.setattr(attention, "SELECTOR", replace(attention.SELECTOR, least=4))
    evaluated = evaluated_model(building_of(recipe, checkpoint, tmp_path), ["attention@1:0.75/full"])
    found = evaluate(evaluated, questions_from(questions), tmp_path)
    assert [entry.row for entry in found.skipped] == [0, 2, 4, 6, 8]
    assert "selector attention chooses 4 tokens or more, and ratio 0.75 leaves 3 of 12" in found.skipped[0].reason
    evaluated = evaluated_model(building_of(recipe, checkpoint, tmp_path), ["attention@1:0.9/full"])
    with pytest.raises(CapaError, match="no row can be asked; row 0: q0: selector attention chooses 4"):
        evaluate(evaluated, questions_from(questions), tmp_path)
