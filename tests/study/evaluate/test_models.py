"""Which methods a model or a bundle can do, and that a bundle says what the model does."""

import shutil
from pathlib import Path

import pytest

from capa_export.base import code
from capa_export.base.code import digest_code
from capa_export.base.errors import CapaError
from capa_export.bundle.store import Bundle
from capa_export.config.recipe import Recipe, load_recipe
from capa_export.config.schedule import Stage, parse_method
from capa_export.data.questions import questions_from
from capa_export.study.evaluate.bundle_answers import BundleAnswers
from capa_export.study.evaluate.eager_answers import EagerAnswers
from capa_export.study.evaluate.models import bundle_model, parse_methods, product_of_methods
from capa_export.study.evaluate.schema import Evaluation
from capa_export.study.evaluate.stage import evaluate
from tests.building import Building
from tests.models import qwen3vl
from tests.study.evaluate.asking import building_of, evaluated_model, rows_of


@pytest.mark.parametrize(
    ("method", "problem"),
    [
        ("capa@9:0.5", "method capa@9:0.5: .*prune layer 9"),
        ("capa@4:0.5", "the last one is too late"),
        ("cap@2:0.5", "unknown selector 'cap'"),
        ("capa@2:1.5", "ratio"),
        ("capa:0.5", "needs a layer"),
    ],
)
def test_a_method_that_does_not_fit(
    method: str, problem: str, recipe: Recipe, checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(CapaError, match=problem):
        evaluated_model(building_of(recipe, checkpoint, tmp_path), [method])
    assert not list(tmp_path.iterdir()), "before anything is run"


def test_a_model_that_exceeds_memory_is_refused_before_it_is_calibrated(
    recipe: Recipe, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("capa_export.model.memory.available_memory", lambda: 1000)
    with pytest.raises(CapaError, match=r"the model takes 0.5 GB in FP32, 0.0 GB are free; end other programs"):
        evaluated_model(building_of(recipe, checkpoint, tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_selector_that_the_family_cannot_offer(tmp_path: Path) -> None:
    folder = qwen3vl.save_model(tmp_path / "checkpoint", qwen3vl.random_model())
    with pytest.raises(CapaError, match=r"method vispruner:0.5/full: selector vispruner needs the vision tower's"):
        evaluated_model(building_of(load_recipe("qwen3vl"), folder, tmp_path / "out"), ["vispruner:0.5/full"])


def test_product(recipe: Recipe) -> None:
    assert product_of_methods(recipe, [], [], [], []) == ["capa@2:0.75"]
    assert product_of_methods(recipe, [], [], [], ["full", "skip"]) == ["capa@2:0.75/full", "capa@2:0.75/skip"]
    assert product_of_methods(recipe, ["capa", "fastv"], [], [0.5, 0.9], []) == [
        "capa@2:0.5",
        "capa@2:0.9",
        "fastv@2:0.5",
        "fastv@2:0.9",
    ]
    assert product_of_methods(recipe, ["attention"], [1, 3], [], []) == ["attention@1:0.75", "attention@3:0.75"]
    data = recipe.model_dump()
    data["prune"] = {"schedule": [{"layer": 1, "ratio": 0.5}, {"layer": 3, "ratio": 0.75}]}
    staged = Recipe(**data)
    assert product_of_methods(staged, [], [], [], []) == ["capa@1:0.5+capa@3:0.75"]
    with pytest.raises(CapaError, match="schedule of 2 stages"):
        product_of_methods(staged, ["fastv"], [], [], [])


@pytest.fixture(scope="session")
def bundle(recipe: Recipe, checkpoint: Path, calibrated: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("bundle") / "out"
    building = Building.of(recipe, Bundle(folder), checkpoint, calibration=calibrated, precision="fp32")
    building.calibrate()
    building.export()
    return building.bundle


def test_a_bundle_says_what_the_model_does(
    bundle: Bundle, questions: Path, alone: tuple[Path, Evaluation], tmp_path: Path
) -> None:
    evaluated = bundle_model(bundle, parse_methods(["capa@2:0.75", "capa@2:0.25"]), 4)
    found = evaluate(evaluated, questions_from(questions), tmp_path)
    assert found.runs == "onnx"
    assert "part of its graphs" in found.notes[0]

    def texts(out: Path) -> list[tuple[str, str]]:
        rows = [row for row in rows_of(out) if row["answer"]["method"] == "capa@2:0.75"]
        return sorted((row["question"], row["answer"]["text"]) for row in rows)

    assert texts(tmp_path) == texts(alone[0])
    few, many = (method.kl for method in found.methods[1:])
    assert few is not None and many is not None and few > many > 0


@pytest.mark.parametrize(
    ("method", "problem"),
    [
        ("capa@1:0.5", r"do capa@2:RATIO at any ratio, and no other"),
        ("attention@2:0.5", r"do capa@2:RATIO at any ratio, and no other"),
        ("capa@2:0.5/full", "leave out what comes after the slash"),
        ("capa@2:0.5/eta=0.9", "leave out what comes after the slash"),
    ],
)
def test_what_a_bundle_cannot_do(bundle: Bundle, method: str, problem: str) -> None:
    with pytest.raises(CapaError, match=problem):
        bundle_model(bundle, parse_methods([method]), 4)


def test_another_bundle_on_the_machine_of_a_worker(bundle: Bundle, tmp_path: Path) -> None:
    copy = Bundle(Path(shutil.copytree(bundle.folder, tmp_path / "copy")))
    prepare = bundle_model(copy, parse_methods(["capa@2:0.75"]), 4).prepare
    prepare()
    recipe = copy.manifest["recipe"]
    recipe["prune"]["min_keep_per_image"] = 3
    copy.update(recipe=recipe)
    with pytest.raises(CapaError, match=r"on \S+ it holds another bundle than where the evaluation was started"):
        prepare()
    (copy.folder / "onnx/llm/config.json").write_text("{}")
    with pytest.raises(CapaError, match=r"config\.json: missing or changed"):
        prepare()


def test_the_recipes_own_selector_keeps_its_options_and_its_ratio_its_digits() -> None:
    stage = Stage(layer=4, ratio=0.5, selector="capa-mmr", options={"balance": 0.7})
    recipe = load_recipe("tiny-qwen25vl")
    recipe = recipe.model_copy(update={"prune": recipe.prune.model_copy(update={"schedule": (stage,)})})
    asked = product_of_methods(recipe, [], [], [0.1234567890123], [])
    assert asked == ["capa-mmr@4:0.1234567890123{balance=0.7}"]
    assert parse_method(asked[0]).stages == (stage.model_copy(update={"ratio": 0.1234567890123}),)
    assert product_of_methods(recipe, ["capa"], [], [0.5], []) == ["capa@4:0.5"]


def test_a_layer_for_selectors_that_have_none_is_refused() -> None:
    with pytest.raises(CapaError, match="--layer: divprune acts before the decoder and takes none"):
        product_of_methods(load_recipe("tiny-qwen25vl"), ["divprune"], [3], [0.5], [])
    both = product_of_methods(load_recipe("tiny-qwen25vl"), ["divprune", "capa"], [3], [0.5], [])
    assert both == ["divprune:0.5", "capa@3:0.5"]


def test_a_change_of_what_answers_asks_again(
    recipe: Recipe, checkpoint: Path, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def keys() -> list[dict[str, str]]:
        building, methods = building_of(recipe, checkpoint, tmp_path), ["capa@2:0.75/full"]
        both = evaluated_model(building, methods), bundle_model(bundle, parse_methods(["capa@2:0.75"]), 4)
        return [dict(evaluated.keys) for evaluated in both]

    eager, onnx = keys()
    assert keys() == [eager, onnx]
    module = BundleAnswers.__module__
    monkeypatch.setattr(code, "digest_code", lambda *names: "other" if names == (module,) else digest_code(*names))
    same, other = keys()
    assert same == eager
    assert onnx and all(other[method] != key for method, key in onnx.items())
    module = EagerAnswers.__module__
    other, same = keys()
    assert same == onnx
    assert eager and all(other[method] != key for method, key in eager.items())
