"""Which stages a plan takes for done, by a manifest alone: none that would run again."""

from pathlib import Path
from typing import Any

import pytest

from capa_export.bundle.store import Bundle
from capa_export.calibrate.scaled_sets import EFFECT
from capa_export.calibrate.sums import CALIBRATION, ROUNDING, Calibration, LayerSums, scales_digest
from capa_export.config.recipe import Recipe, load_recipe
from capa_export.plan.finished import finished_stages
from tests.calibrate.effects import harmless
from tests.recorded import record

CHECKPOINT = {"source": "/model", "revision": None}
ALL = {"calibrate", "export", "engine/rtx", "validate"}


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return Recipe(**load_recipe("qwen25vl").model_dump() | {"ffn": {"eta": 0.5}})


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    layers = [LayerSums.zeros(8) for _ in range(3)]
    for layer, cosine in zip(layers, (0.2, 0.7, 0.9), strict=True):
        layer.visual_tokens, layer.visual_cosine = 1, cosine
    return Calibration("digest", 1, layers, {})


@pytest.fixture
def bundle(tmp_path: Path, recipe: Recipe, calibration: Calibration) -> Bundle:
    """Whole, with an engine whose weights are in it."""
    bundle = Bundle(tmp_path / "bundle")
    bundle.folder.mkdir()
    calibration.save(bundle.folder / CALIBRATION)
    hashes = {**CHECKPOINT, "files": {}, "sha256": {}}
    measured = harmless(calibration, recipe.ffn)
    assert measured.effect is not None
    measured.effect.save(bundle.folder / EFFECT)
    alpha = scales_digest(measured.alphas(measured.scaled_layers(recipe.ffn)))
    entries = {"recipe": recipe.model_dump(mode="json"), "checkpoint": hashes, "hashed": hashes}
    record(bundle.folder, "calibrate", [CALIBRATION], entries=entries, result={ROUNDING: recipe.rounding})
    record(bundle.folder, "effect", [EFFECT], result={})
    record(bundle.folder, "export", [], result={"precision": "fp16", "alpha": alpha})
    record(bundle.folder, "engine/rtx", [], result={"weights": "embedded"})
    return record(bundle.folder, "validate", [], result={})


def done(bundle: Bundle | Path | None, recipe: Recipe, **changes: Any) -> set[str]:
    usual = {"precision": "fp16", "ffn": True, "calibration": None, "in_place": False, "weights": "embedded"}
    folder = bundle.folder if isinstance(bundle, Bundle) else bundle
    return finished_stages(folder, recipe, **{**usual, "checkpoint": CHECKPOINT, **changes})


def test_what_stays_as_it_is_is_done(bundle: Bundle, recipe: Recipe) -> None:
    assert done(bundle, recipe) == ALL
    assert done(bundle, recipe, checkpoint={"files": {}}) == ALL


@pytest.mark.parametrize(
    ("changes", "left"),
    [
        ({"weights": "external"}, sorted(ALL - {"engine/rtx"})),
        ({"precision": "fp32"}, ["calibrate"]),
        ({"in_place": True}, ["calibrate"]),
        ({"ffn": False}, ["calibrate"]),
        ({"checkpoint": {"source": "/other"}}, []),
        ({"checkpoint": {**CHECKPOINT, "revision": "main"}}, []),
    ],
    ids=str,
)
def test_other_options_run_again(bundle: Bundle, recipe: Recipe, changes: dict[str, Any], left: list[str]) -> None:
    assert done(bundle, recipe, **changes) == set(left)


def test_another_recipe_runs_again(bundle: Bundle, recipe: Recipe) -> None:
    """What the scales of another eta cost is yet to be measured."""
    assert done(bundle, recipe.with_options(ratio=0.5)) == {"calibrate"}
    assert done(bundle, recipe.with_options(fp32_layers=["2.mlp"])) == {"calibrate"}
    # Calibration belongs to the weights as they are rounded.
    assert done(bundle, recipe.with_options(quantize="int4:32")) == set()
    assert done(bundle, recipe.with_options(quantize_head="int8")) == set()
    eta = [recipe.model_copy(update={"ffn": recipe.ffn.model_copy(update={"eta": eta})}) for eta in (0.6, 0.8)]
    assert [done(bundle, one) for one in eta] == [{"calibrate"}] * 2


def test_a_bundle_of_an_earlier_version_is_read(bundle: Bundle, recipe: Recipe) -> None:
    bundle.update(recipe={**bundle.manifest["recipe"], "visual_tokens": 64})
    assert done(bundle, recipe) == ALL - {"validate"}


def test_a_calibration_in_place_of_a_run(bundle: Bundle, recipe: Recipe, tmp_path: Path) -> None:
    for folder in (None, tmp_path / "none"):
        assert done(folder, recipe, calibration=bundle.folder) == {"calibrate"}
        assert done(folder, recipe) == set()
    assert done(bundle, recipe, calibration=bundle.folder) == ALL
    (bundle.folder / CALIBRATION).unlink()
    assert done(bundle, recipe) == set()


def test_an_interrupted_export_is_not_done(bundle: Bundle, recipe: Recipe) -> None:
    stages = bundle.manifest["stages"]
    del stages["export"]
    bundle.update(stages=stages)
    assert done(bundle, recipe) == {"calibrate"}


def test_what_was_only_calibrated_is_of_its_rounding(bundle: Bundle, recipe: Recipe) -> None:
    rounded = recipe.with_options(quantize="int4:32")
    calibrated = {**bundle.stage("calibrate"), "result": {ROUNDING: rounded.rounding}}
    bundle.update(stages={"calibrate": calibrated})
    assert done(bundle, rounded) == {"calibrate"} and done(bundle, recipe) == set()
