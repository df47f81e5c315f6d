"""Samples decide what weights are rounded to, in a stage of the bundle that all later ones are of."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from capa_export.base.errors import CapaError, ExitCode
from capa_export.bundle.store import Bundle
from capa_export.cli import main
from capa_export.config.recipe import Recipe, load_recipe, ranges
from capa_export.model.model import Model, recorded_model
from capa_export.model.quantized.choice import CHOICE, QUANTIZE, WeightChoice
from capa_export.plan.plan import dry_run
from capa_export.run.bundled import bundled_dims
from tests.building import Building
from tests.conftest import noise
from tests.quantizing import FORMATS, quantize

READERS = tuple(f"{name}_proj.weight" for name in ("q", "k", "v", "gate", "up"))


@pytest.fixture(scope="module")
def folder(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of which a few inputs of the products behind norms are large, and their weights small.

    It computes what it did before, and rounding loses these weights.
    """
    folder = Path(shutil.copytree(checkpoint, tmp_path_factory.mktemp("outliers") / "checkpoint"))
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if "visual" in name:
            continue
        if name.endswith(("input_layernorm.weight", "post_attention_layernorm.weight")):
            tensor[[3, 20, 41]] *= 16
        elif name.endswith(READERS):
            tensor[:, [3, 20, 41]] /= 16
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    noise(224, 224).save(folder.parent / "picture.png")
    return folder


def building(folder: Path, out: Path, quantize: str = "int4:32", **options: Any) -> Building:
    data: dict[str, Any] = load_recipe("qwen25vl").model_dump()
    data["prune"] = {"schedule": [{"layer": 2, "ratio": 0.75}]}
    data["ffn"] = {"eta": 0.5, "budget": 100}
    data["parity"] |= {"prompts": 1, "steps": 2, "accuracy_samples": 1}
    recipe = Recipe.model_validate({**data, "quantize": quantize})
    return Building.of(recipe, Bundle(out), folder, images=folder.parent / "picture.png", **options)


def test_a_build_is_of_the_chosen_weights_and_loses_less_than_rounding_to_nearest(folder: Path, tmp_path: Path) -> None:
    chosen, nearest = building(folder, tmp_path / "awq"), building(folder, tmp_path / "rtn", "int4:32/rtn")
    parity, other = chosen.build(), nearest.build()
    for found in (parity, other):
        assert found.passed, [check.failure for error in found.export_error for check in error.checks]
    assert parity.quantization_error and other.quantization_error
    lost, more = parity.quantization_error.kl, other.quantization_error.kl
    assert lost is not None and more is not None and lost < 0.6 * more
    assert parity.quantization_error.weights == "35 layers of INT4, scaled by activations, groups of 32"
    assert other.quantization_error.weights == "35 layers of INT4, rounded to nearest, groups of 32"
    stages = chosen.bundle.manifest["stages"]
    assert next(iter(stages)) == QUANTIZE and QUANTIZE not in nearest.bundle.manifest["stages"]
    errors = stages[QUANTIZE]["result"]["errors"]
    assert len(errors) == 5 and all(0 < error < 1 for error in errors)

    again = recorded_model(chosen.bundle)
    assert again.digest == chosen.model.digest != nearest.model.digest
    name = "model.layers.1.mlp.up_proj.weight"
    assert np.array_equal(again.source.tensors[name].mapped(), chosen.model.source.tensors[name].mapped())
    seen = list[str]()

    def report(what: str, _done: int, _total: int) -> None:
        seen.append(what)

    assert chosen.again(report=report).build().passed
    assert not [what for what in seen if "choose weights" in what]


def test_the_layers_that_stay_plain_are_said_and_recorded(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = building(folder, tmp_path / "out", "int4:32/rtn", ffn=False)
    kept.recipe = kept.recipe.model_copy(update={"auto_precision": True, "quantization_budget": 0.0})
    unknown = planned(kept)
    assert unknown["plain_layers"] is None
    kept.export()
    assert kept.bundle.stage("export")["result"]["packing"] is None
    whole = planned(kept)
    assert whole["files"] == planned(building(folder, tmp_path / "plain", "none"))["files"]
    chosen = building(folder, tmp_path / "out", "int4:32/rtn", ffn=False)
    first = kept.bundle.stage(QUANTIZE)["result"]["tried"][0][1]
    chosen.recipe = kept.recipe.model_copy(update={"quantization_budget": 0.5 * first})
    chosen.export()
    plain = chosen.bundle.stage(QUANTIZE)["result"]["plain"]
    assert 0 < len(plain) < 5
    packing = chosen.bundle.stage("export")["result"]["packing"]
    assert packing["plain"] == plain and packing["packed"] == 7 * (5 - len(plain)) - (2 not in plain)
    known = planned(chosen)
    assert known["plain_layers"] == plain
    least, some, most = (plan["files"]["onnx weights"] for plan in (unknown, known, whole))
    assert some - least == (most - least) * len(plain) // 5 > 0
    assert bundled_dims(chosen.bundle).decoder.num_plain == recorded_model(chosen.bundle).source.dims.decoder.num_plain
    found = chosen.validate()
    assert found.passed, [check.failure for error in found.export_error for check in error.checks]
    words = capsys.readouterr().err
    assert f"layers {ranges(plain)} stay plain: KL" in words and f"decoder layers {ranges(plain)} stay fp16" in words
    assert recorded_model(chosen.bundle).digest == chosen.model.digest


def planned(asked: Building) -> dict[str, Any]:
    return dry_run(asked.recipe, asked.checkpoint, asked.bundle.folder, "fp16", ffn=False)


def test_a_plan_says_that_layers_may_stay_plain(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", str(folder), "--model", "qwen25vl", "--prune-layer", "2", "--target", "onnx"]
    words = "all layers are counted as rounded; those that --auto-precision leaves plain add to sizes and times"
    for more in ([], ["--quantize", "int4:32"]):
        assert main([*command, *more]) == ExitCode.OK
        assert words not in capsys.readouterr().out
    assert main([*command, "--quantize", "int4:32", "--auto-precision"]) == ExitCode.OK
    assert words in capsys.readouterr().out


def test_auto_precision_without_rounding_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["export", str(folder), "--model", "qwen25vl", "--out", str(folder.parent / "no"), "--auto-precision"]
    for more in ([], ["--quantize", "none"]):
        assert main([*command, *more]) == ExitCode.USAGE
        assert "--auto-precision says which layers --quantize leaves as they are" in capsys.readouterr().err


def test_a_calibration_made_elsewhere_brings_its_choice(folder: Path, tmp_path: Path) -> None:
    made = building(folder, tmp_path / "made")
    made.calibrate()
    adopting = building(folder, tmp_path / "adopting", calibration=tmp_path / "made")
    adopting.calibrate()
    adopting.export()
    assert adopting.model.digest == made.model.digest
    plain = building(folder, tmp_path / "plain", "int4:32/rtn")
    plain.calibrate()
    with pytest.raises(CapaError, match=f"{CHOICE}: no such file"):
        building(folder, tmp_path / "other", calibration=tmp_path / "plain").calibrate()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, "measured on another checkpoint than"),
        ({"auto_precision": True}, "weights were chosen without --auto-precision, not for 0.02 nats; ask for the same"),
    ],
    ids=str,
)
def test_a_calibration_that_does_not_fit_costs_nothing(
    folder: Path, tmp_path: Path, changes: dict[str, Any], problem: str
) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "other" / "checkpoint"))
    if not changes:
        tensors = load_file(other / "model.safetensors")
        tensors["lm_head.weight"] *= 2
        save_file(tensors, other / "model.safetensors", {"format": "pt"})
    shutil.copy(folder.parent / "picture.png", other.parent)
    building(other, tmp_path / "made").calibrate()
    exported = building(folder, tmp_path / "out", ffn=False)
    exported.export()
    before = exported.bundle.manifest
    adopting = exported.again(calibration=tmp_path / "made")
    adopting.recipe = adopting.recipe.model_copy(update=changes)
    with pytest.raises(CapaError, match=problem):
        adopting.calibrate()
    assert exported.bundle.manifest == before
    exported.bundle.verify(QUANTIZE, "export")


def test_weights_that_were_chosen_apart_are_not_added_up(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    building(folder, tmp_path / "made").calibrate()
    assert main(["calibrate", "--merge", str(tmp_path / "made"), "-o", str(tmp_path / "sum")]) == ExitCode.PREFLIGHT
    assert "calibrate each with --quantize int4/rtn, without --auto-precision, to add" in capsys.readouterr().err
    assert not (tmp_path / "sum").exists()
    # What lies there from before is not what the calibration is of.
    building(folder, tmp_path / "made", "int4:32/rtn").calibrate()
    assert (tmp_path / "made" / CHOICE).exists()
    assert main(["calibrate", "--merge", str(tmp_path / "made"), "-o", str(tmp_path / "sum")]) == 0


def test_a_recipe_that_leaves_layers_plain_says_of_which_rounding() -> None:
    recipe = load_recipe("qwen25vl").model_copy(update={"auto_precision": True})
    with pytest.raises(CapaError, match="recipe qwen25vl: auto_precision says which layers --quantize leaves"):
        recipe.with_options()
    assert recipe.with_options(quantize="int4").rounding == {"quantize": "int4", "budget": 0.02}
    assert recipe.with_options(quantize="none").rounding == {"quantize": "none", "budget": None}


def test_layers_that_are_quantized_already_cannot_stay_plain(folder: Path, tmp_path: Path) -> None:
    published = Path(shutil.copytree(folder, tmp_path / "published"))
    quantize(published, FORMATS["FP8"])
    given = building(published, tmp_path / "out", "fp8", ffn=False).again(images=folder.parent / "picture.png")
    given.recipe = given.recipe.model_copy(update={"auto_precision": True})
    with pytest.raises(CapaError, match=r"--auto-precision: .*published is quantized already"):
        given.export()


def test_other_samples_outdate_what_was_exported(folder: Path, tmp_path: Path) -> None:
    first = building(folder, tmp_path / "out")
    first.calibrate()
    first.export()
    noise(196, 112, 3).save(tmp_path / "other.png")
    second = first.again(images=tmp_path / "other.png")
    second.calibrate()
    assert second.model.choice and first.model.choice and second.model.choice.digest() != first.model.choice.digest()
    assert set(first.bundle.manifest["stages"]) == {QUANTIZE, "calibrate", "effect"}


def test_an_export_takes_the_choice_that_is_there_and_makes_one_where_there_is_none(
    folder: Path, tmp_path: Path
) -> None:
    made = building(folder, tmp_path / "out")
    made.calibrate()
    without_pictures = made.again(images=None)
    without_pictures.export()
    assert without_pictures.model.digest == made.model.digest
    alone = building(folder, tmp_path / "alone", ffn=False)
    alone.export()
    assert alone.bundle.stage(QUANTIZE)["result"]["errors"]
    with pytest.raises(CapaError, match="no pictures; pass --images"):
        building(folder, tmp_path / "none", ffn=False).again(images=None).export()


def test_a_choice_that_was_changed_is_found(folder: Path, tmp_path: Path) -> None:
    made = building(folder, tmp_path / "out")
    made.calibrate()
    made.export()
    choice = WeightChoice.load(tmp_path / "out" / CHOICE)
    replace(choice, factors={name: 2 * values for name, values in choice.factors.items()}).save(
        tmp_path / "out" / CHOICE
    )
    with pytest.raises(CapaError, match=CHOICE):
        recorded_model(made.bundle)


def test_nothing_reads_weights_that_nobody_decided(folder: Path) -> None:
    model = Model(recipe=load_recipe("qwen25vl").with_options(quantize="int4:32"), checkpoint=str(folder))
    assert model.source.block_forms()
    with pytest.raises(
        CapaError, match="which nobody has looked at; run `capa-export calibrate` with the same --quant"
    ):
        _ = model.eager


def test_a_plan_needs_no_samples(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(folder), "--model", "qwen25vl", "--quantize", "int4:32", "--json"]) == 0
    assert capsys.readouterr().out
