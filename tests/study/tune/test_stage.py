"""`tune` from end to end: within the budget, no worse than the recipe's own, and read again by `load_recipe`."""

from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from capa_export.base.errors import ExitCode
from capa_export.base.statistics import Difference
from capa_export.bundle.store import Bundle
from capa_export.calibrate.sums import Calibration
from capa_export.cli import main
from capa_export.config.recipe import Recipe, load_recipe
from capa_export.config.schedule import Method, parse_method
from capa_export.model.agreement import Agreement, DenseAnswer
from capa_export.model.model import Model
from capa_export.model.prompt import Prompter, Turn
from capa_export.study.tune.agreement import Judge
from capa_export.study.tune.costs import Costs, PromptShape
from capa_export.study.tune.recipe_file import write_recipe
from capa_export.study.tune.schema import Finalist, Tuning
from capa_export.study.tune.stage import _recipe, _verdict
from tests.building import Building
from tests.conftest import noise
from tests.models.qwen25vl import random_model, save_model

COUNT = 11


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven pictures of two sizes."""
    folder = tmp_path_factory.mktemp("images")
    for index in range(COUNT):
        noise(168, 140 + 28 * (index % 2), index).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def recipe_file(recipe: Recipe, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "small.toml"
    write_recipe(path, recipe.model_copy(update={"checkpoint": str(checkpoint)}), "")
    return path


@pytest.fixture(scope="module")
def calibrated(recipe: Recipe, checkpoint: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    bundle = Bundle(tmp_path_factory.mktemp("calibrated"))
    Building.of(recipe, bundle, checkpoint, images=images, samples=3).calibrate()
    return bundle.folder


@pytest.fixture(scope="module")
def arguments(recipe_file: Path, images: Path, calibrated: Path) -> list[str]:
    return ["tune", "--model", str(recipe_file), "--images", str(images), "--calibration", str(calibrated), "--json"]


def tuned(arguments: Sequence[str], out: Path, budget: str) -> Tuning:
    stdout = StringIO()
    with redirect_stdout(stdout):
        assert main([*arguments, "--budget", budget, "--out", str(out)]) == ExitCode.OK
    return Tuning.model_validate_json(stdout.getvalue())


@pytest.fixture(scope="module")
def found(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Tuning, Path]:
    out = tmp_path_factory.mktemp("tuned") / "tuned.toml"
    return tuned(arguments, out, "0.6"), out


def test_tuned_recipe(found: tuple[Tuning, Path], recipe: Recipe, prompter: Prompter, calibrated: Path) -> None:
    tuning, path = found
    assert (tuning.samples, tuning.judges, tuning.budget, tuning.left_out) == (COUNT, 8, 0.6, ())
    _check_costs(tuning, prompter, calibrated)
    by_name = {row.method: row for row in tuning.finalists}
    chosen, own = by_name[tuning.chosen], by_name[str(tuning.own)]
    assert own.method.startswith("capa@1:") and own.gain is None
    assert chosen.kl is not None and own.kl is not None and chosen.kl <= own.kl
    for row in tuning.finalists:
        if row is not own:
            assert row.kl is not None and row.gain is not None
            assert row.gain.value == pytest.approx(own.kl - row.kl)
    best = tuning.finalists[0]
    assert (chosen is best) == (best is own or (best.gain is not None and best.gain.low > 0))

    written, method = load_recipe(str(path)), parse_method(tuning.chosen)
    assert written.prune.schedule == method.stages
    assert Calibration.load(calibrated).linear_layers(written.ffn.eta) == chosen.linear_layers
    assert written.model_copy(update={"prune": recipe.prune, "ffn": recipe.ffn, "name": recipe.name}) == (
        recipe.model_copy(update={"checkpoint": written.checkpoint})
    )
    head = path.read_text().splitlines()
    assert head[0].startswith("# Made by capa-export") and tuning.chosen in head[1] and head[2] == f"# {tuning.verdict}"


def _check_costs(tuning: Tuning, prompter: Prompter, calibrated: Path) -> None:
    prompts = [
        prompter.chat([Turn("user", [noise(168, 140 + 28 * (index % 2)), "Describe this image."])])
        for index in range(COUNT)
    ]
    shapes = [PromptShape(tuple(prompt.image_lengths), len(prompt.input_ids) - prompt.num_visual) for prompt in prompts]
    costs = Costs(prompter.dims.decoder, 1, shapes)
    assert tuning.dense_flops == costs.dense / COUNT
    calibration = Calibration.load(calibrated)
    for row in tuning.finalists:
        method = parse_method(row.method)
        linear = calibration.linear_layers(method.eta) if method.eta else ()
        assert row.linear_layers == linear
        assert row.flops == costs.share(method, linear) <= 0.6


@pytest.mark.slow
def test_the_same_budget_in_flops_gives_the_same(
    found: tuple[Tuning, Path], arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuning, path = found
    out = tmp_path / "number.toml"
    arguments = [word for word in arguments if word != "--json"]
    assert main([*arguments, "--budget", str(0.6 * tuning.dense_flops), "--out", str(out)]) == ExitCode.OK
    said = capsys.readouterr()
    assert f"* {tuning.chosen}" in said.out and str(tuning.own) in said.out and tuning.verdict in said.out
    assert "60.0% of dense's FLOPs, on 8 samples" in said.out
    assert "schedules of one stage" in said.err and " min at the " in said.err
    assert out.read_text().splitlines()[1:] == path.read_text().splitlines()[1:]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--budget", "0.6", "--out", "{}/none/x.toml"], "its folder does not exist"),
        (["--budget", "0.6", "--out", "{}/x.json"], "a recipe is a .toml file"),
        (["--budget", "0", "--out", "{}/x.toml"], "must be a fraction of dense"),
        (["--budget", "1e18", "--out", "{}/x.toml"], "nothing is to be saved"),
        (["--budget", "0.1", "--out", "{}/x.toml"], "text alone takes"),
        (["--budget", "0.6", "--out", "{}/x.toml", "--samples", "5"], "5 pictures of"),
    ],
)
def test_bad_input(
    options: list[str], line: str, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, *(option.format(tmp_path) for option in options)]) != ExitCode.OK
    said = capsys.readouterr()
    assert said.out == ""
    (error,) = [entry for entry in said.err.splitlines() if entry.startswith("error: ")]
    assert line in error
    assert not list(tmp_path.iterdir())


def test_a_model_that_exceeds_memory(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("capa_export.model.memory.available_memory", lambda: 1000)
    assert main([*arguments, "--budget", "0.6", "--out", str(tmp_path / "x.toml")]) == ExitCode.PREFLIGHT
    said = capsys.readouterr().err
    assert "the model takes 0.5 GB in FP32, 0.0 GB are free" in said
    assert not list(tmp_path.iterdir())


def test_calibration_of_another_checkpoint(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = save_model(tmp_path / "other", random_model(seed=1))
    options = ["--checkpoint", str(other), "--budget", "0.6", "--out", str(tmp_path / "x.toml")]
    assert main([*arguments, *options]) != ExitCode.OK
    assert "measured on another checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "x.toml").exists()


@pytest.mark.parametrize("broken", ["all", "own"])
def test_what_is_no_number_is_not_chosen(
    broken: str,
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def measured(_: Judge, method: Method, _sample: DenseAnswer) -> Agreement:
        return Agreement(float("nan") if broken == "all" or method.name.startswith("capa@1") else 1, 0.5)

    monkeypatch.setattr(Judge, "agreement", measured)
    out = tmp_path / "x.toml"
    code = main([*arguments, "--budget", "0.6", "--out", str(out)])
    said = capsys.readouterr()
    if broken == "all":
        assert code == ExitCode.PREFLIGHT and not out.exists()
        assert "its logits are no numbers, with all tokens or with any schedule" in said.err
    else:
        tuning = Tuning.model_validate_json(said.out)
        assert code == ExitCode.OK and tuning.own is not None and tuning.own.startswith("capa@1")
        assert tuning.chosen == tuning.finalists[0].method and tuning.finalists[0].kl == 1
        assert [row.kl for row in tuning.finalists if row.method == tuning.own] == [None]
        assert "are no numbers" in tuning.verdict and "KL 1 nats" in out.read_text()


def test_full_ffns_are_an_eta_that_no_layer_exceeds(recipe: Recipe, checkpoint: Path) -> None:
    written = _recipe(Model(recipe=recipe, checkpoint=str(checkpoint)), parse_method("divprune:0.5+capa@2:0.9/full"))
    assert written.ffn.eta == 0.999999
    assert [stage.where for stage in written.prune.schedule] == ["before the decoder", "after layer 2"]


@pytest.mark.parametrize(
    ("low", "earlier", "own", "broken", "words"),
    [
        (
            0.1,
            0,
            "capa@2:0.5",
            False,
            "fastv@2:0.6 agrees better with dense than the recipe's own schedule at this budget",
        ),
        (
            0.1,
            1,
            "capa@1:0.5",
            False,
            "(capa@1:0.5, 1 layer earlier than the recipe has it since later is beyond the budget)",
        ),
        (-0.1, 0, "capa@2:0.5", False, "stays: fastv@2:0.6 agrees better with dense, but not beyond chance"),
        (0.1, 0, "fastv@2:0.6", False, "(fastv@2:0.6) agrees best with dense, so it stays"),
        (0.1, 0, None, False, "meets the budget at no ratio and at no earlier layer"),
        (
            0.1,
            0,
            "capa@2:0.5",
            True,
            "the figures of the recipe's own schedule at this budget (capa@2:0.5) are no numbers",
        ),
    ],
)
def test_verdict(low: float, earlier: int, own: str | None, words: str, *, broken: bool) -> None:
    gain = Difference(value=0.2, low=low, high=0.3)
    best = Finalist(method="fastv@2:0.6", linear_layers=(), flops=0.4, kl=0.1, top1=1, gain=gain)
    assert words in _verdict(best, parse_method(own) if own else None, earlier, broken=broken)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_trained_model_without_calibration(tmp_path: Path) -> None:
    """The shipped one, at a budget that its schedule meets only two layers earlier, where it is bad."""
    out = tmp_path / "x.toml"
    arguments = ["tune", "--model", "tiny-qwen25vl", "--samples", "32", "--json"]
    found = tuned(arguments, out, "0.25")
    assert found.own is not None and found.own.startswith("capa@0:")
    best = found.finalists[0]
    assert found.chosen == best.method and best.gain is not None and best.gain.low > 0
    assert "2 layers earlier than the recipe has it" in found.verdict
    assert load_recipe(str(out)).checkpoint == load_recipe("tiny-qwen25vl").checkpoint
