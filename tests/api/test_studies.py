"""Methods from Python: what the commands find, nothing printed, and a user's mistakes as errors."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

import capa_export
from capa_export import CapaError
from capa_export.api.stages import export
from capa_export.base.errors import ExitCode
from capa_export.bundle.store import Bundle
from capa_export.calibrate.sums import Calibration
from capa_export.cli.evaluate import evaluate as evaluate_command
from capa_export.cli.tune import tune as tune_command
from capa_export.config.quantization import Quantization
from capa_export.config.recipe import Recipe, load_recipe
from capa_export.config.schedule import parse_method
from capa_export.data.samples import samples_from
from capa_export.study.evaluate.schema import Evaluation
from capa_export.study.evaluate.stage import EVALUATION
from capa_export.study.tune.agreement import Judge
from capa_export.study.tune.recipe_file import write_recipe
from tests.building import Building
from tests.conftest import noise


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for index in range(11):
        noise(112, 84 + 28 * (index % 2), index).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def questions(pictures: Path) -> Path:
    path = pictures.parent / "questions.jsonl"
    rows = [{"image": str(pictures / f"{index}.png"), "question": "what ?", "answer": "red"} for index in range(3)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def recipe(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights are linear nowhere near 0.96."""
    data = load_recipe("qwen25vl").model_dump()
    data |= {"checkpoint": str(checkpoint), "ffn": {"eta": 0.5}, "prune": {"schedule": [{"layer": 1, "ratio": 0.75}]}}
    path = tmp_path_factory.mktemp("recipe") / "small.toml"
    write_recipe(path, Recipe(**data), "")
    return path


@pytest.fixture(scope="module")
def bundle(recipe: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its FFNs stay as they are, so that it needs no calibration."""
    folder = tmp_path_factory.mktemp("bundle")
    export(str(checkpoint), out=folder, recipe=str(recipe), schedule="capa@1:0.75/full")
    return folder


class Told(list[tuple[str, int, int]]):
    """Calls of a progress."""

    def __call__(self, what: str, done: int, total: int) -> None:
        self.append((what, done, total))


@pytest.fixture
def told() -> Told:
    """What progress was told."""
    return Told()


Quiet = Callable[[], None]


@pytest.fixture
def is_quiet(capfd: pytest.CaptureFixture[str]) -> Quiet:
    """Holds that stdout is empty since the test began."""

    def is_quiet() -> None:
        assert capfd.readouterr().out == ""

    capfd.readouterr()
    return is_quiet


def test_a_checkpoint_is_evaluated(recipe: Path, questions: Path, tmp_path: Path, told: Told, is_quiet: Quiet) -> None:
    found = capa_export.evaluate(
        data=questions,
        out=tmp_path / "out",
        recipe=str(recipe),
        methods=["capa@1:0.5/full"],
        limit=2,
        max_new_tokens=2,
        progress=told,
    )
    is_quiet()
    assert found == Evaluation.model_validate_json((tmp_path / "out" / EVALUATION).read_text())
    assert found.runs == "eager fp32" and found.questions == 2 and not found.skipped
    assert [method.method for method in found.methods] == ["dense", "capa@1:0.5/full"]
    assert ("evaluate", 2, 2) in told


def test_rounded_weights_are_evaluated(recipe: Path, questions: Path, pictures: Path, tmp_path: Path) -> None:
    """Samples decide of them though every FFN stays, and answers of other weights are no answers of these."""

    def found(out: str, quantize: str | None, **options: Any) -> Evaluation:
        given = {"recipe": str(recipe), "methods": ["capa@1:0.5/full"], "limit": 2, "max_new_tokens": 2}
        return capa_export.evaluate(data=questions, out=tmp_path / out, quantize=quantize, **given, **options)

    plain, nearest = found("plain", None), found("nearest", "int4:32/rtn")
    scaled = found("scaled", "int4:32", images=pictures, samples=2)
    assert plain.notes == ()
    assert nearest.notes == ("weights of all, dense too: 35 layers of INT4, rounded to nearest, groups of 32",)
    assert scaled.notes == ("weights of all, dense too: 35 layers of INT4, scaled by activations, groups of 32",)
    head, tower = found("head", None, quantize_head="int8"), found("tower", None, quantize_vision="int8")
    assert len({run.methods[1].kl for run in (plain, nearest, scaled, head, tower)}) == 5
    with pytest.raises(CapaError, match="of another model"):
        found("plain", "int8")


def test_a_bundle_is_evaluated(bundle: Path, questions: Path, tmp_path: Path, told: Told, is_quiet: Quiet) -> None:
    """By its own schedule, where no method is given."""
    found = capa_export.open(bundle).evaluate(str(questions), out=tmp_path / "out", max_new_tokens=2, progress=told)
    is_quiet()
    assert found == Evaluation.model_validate_json((tmp_path / "out" / EVALUATION).read_text())
    assert found.runs == "onnx" and found.questions == 3
    assert [method.method for method in found.methods] == ["dense", "capa@1:0.75"]
    assert found.methods[1].kept == pytest.approx(0.25, abs=0.05)
    assert ("evaluate", 3, 3) in told


@pytest.mark.parametrize("quantize", [pytest.param(None, marks=pytest.mark.exhaustive), "int4:32"])
def test_a_recipe_is_tuned(
    quantize: Quantization | None,
    recipe: Path,
    checkpoint: Path,
    pictures: Path,
    tmp_path: Path,
    told: Told,
    is_quiet: Quiet,
) -> None:
    calibrated = Bundle(tmp_path / "calibrated")
    own = load_recipe(str(recipe)).model_copy(update={"quantize": quantize})
    building = Building.of(own, calibrated, checkpoint, images=pictures, samples=2)
    building.calibrate()
    out = tmp_path / "tuned.toml"
    found = capa_export.tune(
        recipe=str(recipe),
        budget=0.6,
        out=str(out),
        images=pictures,
        calibration=calibrated.folder,
        quantize=quantize,
        command=["tune", "a b"],
        progress=told,
    )
    is_quiet()
    best = next(row for row in found.finalists if row.method == found.chosen)
    assert best.flops <= found.budget == 0.6
    assert out.read_text().startswith("# Made by capa-export tune 'a b'\n")
    written = load_recipe(str(out))
    assert (written.checkpoint, written.quantize) == (str(checkpoint), quantize)
    # The finalists' figures are those of the weights that were asked for, on the samples that came last.
    method = parse_method(best.method)
    judge = Judge(building.model, Calibration.load(calibrated.folder), [stage.selector for stage in method.stages])
    last = list(samples_from(pictures, own, found.samples, split="train"))[-found.judges :]
    assert best.kl == pytest.approx(fmean(judge.agreement(method, judge.run_dense(sample)).kl for sample in last))
    assert told


def test_mistakes(recipe: Path, bundle: Path, questions: Path, tmp_path: Path) -> None:
    with pytest.raises(CapaError, match=r"tuned.json: a recipe is a .toml file") as error:
        capa_export.tune(recipe=str(recipe), budget=0.5, out=tmp_path / "tuned.json")
    assert error.value.code == ExitCode.USAGE
    with pytest.raises(CapaError, match="--samples: no method replaces visual FFNs"):
        capa_export.evaluate(
            data=questions, out=tmp_path / "out", recipe=str(recipe), methods=["capa@1:0.5/full"], samples=3
        )
    with pytest.raises(CapaError, match="do capa@1:RATIO at any ratio, and no other"):
        capa_export.open(bundle).evaluate(questions, out=tmp_path / "out", methods=["divprune:0.5"])
    with pytest.raises(CapaError, match=r"q.jsonl: no such"):
        capa_export.open(bundle).evaluate(tmp_path / "q.jsonl", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("function", "command", "by_command"),
    [
        (
            capa_export.evaluate,
            evaluate_command,
            {"method", "selector", "layer", "ratio", "ffn", "provider", "verify_key"},
        ),
        (capa_export.tune, tune_command, set[str]()),
    ],
)
def test_functions_take_what_commands_take(
    function: Callable[..., object], command: Callable[..., object], by_command: set[str]
) -> None:
    own, asked = inspect.signature(function).parameters, inspect.signature(command).parameters
    assert asked.keys() - own.keys() == {"source", "model", "as_json", *by_command}
    assert own.keys() - asked.keys() == {"recipe", "progress", *(["methods"] if by_command else ["command"])}
    for name in own.keys() & asked.keys():
        assert own[name].default == asked[name].default, name


def test_a_bundle_takes_what_a_checkpoint_takes() -> None:
    whole = inspect.signature(capa_export.evaluate).parameters
    own = inspect.signature(capa_export.Bundle.evaluate).parameters
    # A checkpoint is asked in PyTorch.
    assert own.keys() - whole.keys() == {"self", "provider"}
    assert whole.keys() - own.keys() == {
        *("checkpoint", "recipe", "revision", "images", "samples", "calibration"),
        *("quantize", "quantize_head", "quantize_vision", "auto_precision"),
    }
    for name in own.keys() & whole.keys():
        assert own[name].default == whole[name].default, name
