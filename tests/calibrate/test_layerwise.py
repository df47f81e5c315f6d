"""Calibration layer by layer: bit for bit that of the model in memory, for every family, and nothing left behind."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from capa_export.base.errors import CapaError, ExitCode
from capa_export.base.toml import shipped
from capa_export.bundle.store import Bundle
from capa_export.calibrate import layerwise as module
from capa_export.calibrate.layerwise import calibrate_layerwise
from capa_export.calibrate.measure import calibrate
from capa_export.calibrate.sums import Calibration
from capa_export.calibrate.unfinished import UnfinishedSums
from capa_export.cli import main
from capa_export.config.recipe import load_recipe
from capa_export.data.samples import Samples, samples_from
from capa_export.model.checkpoint import open_checkpoint
from capa_export.model.families import load_family
from capa_export.model.memory import calibration_bytes
from capa_export.model.prompt import Prompter
from capa_export.model.source import Source
from capa_export.plan.plan import dry_run
from tests.building import Building
from tests.conftest import noise
from tests.models import FAMILIES, internvl3, qwen25vl


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    folder = tmp_path_factory.mktemp("pictures")
    for index in range(4):
        noise(56 + 56 * index, 84, index).save(folder / f"{index}.png")
    return samples_from(folder, load_recipe("qwen25vl"), 500, split="train")


def opened(folder: Path, family: str) -> tuple[Source, Prompter]:
    source = Source.of(open_checkpoint(str(folder)), load_family(family))
    return source, Prompter(folder, folder, source.family, source.dims)


def streamed(folder: Path, family: str, samples: Samples, scratch: Path) -> Calibration:
    source, prompter = opened(folder, family)
    return calibrate_layerwise(source, prompter, samples, checkpoint_digest="x", unfinished=UnfinishedSums(scratch))


def in_memory(folder: Path, family: str, samples: Samples) -> Calibration:
    source, prompter = opened(folder, family)
    architecture = getattr(transformers, source.family.ARCHITECTURE)
    model = architecture.from_pretrained(folder, dtype=torch.float32).eval()
    return calibrate(model, source.family, prompter, samples, checkpoint_digest="x")


def assert_same(folder: Path, family: str, samples: Samples, scratch: Path) -> None:
    """Both run the same modules on the same numbers in the same order, so that nothing may differ."""
    expected = in_memory(folder, family, samples)
    found = streamed(folder, family, samples, scratch)
    assert found.absmax == expected.absmax
    assert len({sums.visual_cosine for sums in expected.layers}) == len(expected.layers)
    assert found.digest() == expected.digest()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equals_in_memory(family: str, dtype: torch.dtype, pictures: Samples, tmp_path: Path) -> None:
    model = FAMILIES[family].random_model().to(dtype)
    folder = FAMILIES[family].save_model(tmp_path / "checkpoint", model, max_shard_size="100KB")
    (tmp_path / "scratch").mkdir()
    assert_same(folder, family, pictures, tmp_path / "scratch")


def test_equals_in_memory_on_the_trained_model(tmp_path: Path) -> None:
    folder = shipped("graphs") / "checkpoints/tiny-qwen25vl"
    assert_same(folder, "qwen25vl", Samples(count=24, name="", has_answers=True), tmp_path)


def test_the_other_tensor_layout_and_a_tied_head(pictures: Samples, tmp_path: Path) -> None:
    model = internvl3.random_model(tie=True)
    folder = internvl3.save_model(tmp_path / "checkpoint", model, save_original_format=False)
    (tmp_path / "scratch").mkdir()
    assert_same(folder, "internvl3", pictures, tmp_path / "scratch")


def test_weights_are_there_only_while_they_are_used(
    checkpoint: Path, pictures: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    held: list[int] = []
    hollow, load = module.hollow_model, module.StoredWeights.load

    def remember(source: Source, weights: Any) -> Any:
        made.append(hollow(source, weights))
        return made[0]

    def weigh(*arguments: Any) -> None:
        load(*arguments)
        held.append(matrices(made[0]))

    monkeypatch.setattr(module, "hollow_model", remember)
    monkeypatch.setattr(module.StoredWeights, "load", weigh)
    streamed(checkpoint, "qwen25vl", pictures, tmp_path)
    inner = qwen25vl.random_model().model
    beside = matrices(inner.visual) - matrices(inner.visual.blocks)
    block, layer = matrices(inner.visual.blocks[0]), matrices(inner.language_model.layers[0])
    assert held == [beside, *[beside + block] * 3 * pictures.count, *[layer] * 5, 0]
    assert matrices(made[0]) == 0


def matrices(model: Any) -> int:
    """Elements in memory of what is not a vector."""
    return sum(value.numel() for value in model.parameters() if not value.is_meta and value.ndim > 1)


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def own(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy, to be changed."""
    (tmp_path / "scratch").mkdir()
    return shutil.copytree(checkpoint, tmp_path / "checkpoint")


DAMAGED = ("model.layers.2.mlp.up_proj.weight", "visual.blocks.1.attn.qkv.bias", "model.embed_tokens.weight")


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_weights_are_named(own: Path, pictures: Samples, tmp_path: Path, name: str) -> None:
    change(own, lambda tensors: tensors[name].view(-1)[:].fill_(float("nan")))
    with pytest.raises(CapaError, match=f"tensor {name} holds NaN or infinity"):
        streamed(own, "qwen25vl", pictures, tmp_path / "scratch")
    with pytest.raises(CapaError, match=f"tensor .*{name.split('.', 1)[1]} holds NaN or infinity"):
        in_memory(own, "qwen25vl", pictures)


def test_states_that_overflow_are_refused(own: Path, pictures: Samples, tmp_path: Path) -> None:
    change(own, lambda tensors: tensors["model.layers.3.mlp.down_proj.weight"].fill_(3e38))
    with pytest.raises(CapaError, match=r"the output of model.language_model.layers.3\S* is not finite, even in FP32"):
        streamed(own, "qwen25vl", pictures, tmp_path / "scratch")


def test_weights_that_do_not_fit_the_config_are_refused(own: Path, pictures: Samples, tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    change(own, lambda tensors: tensors.update({name: torch.zeros(16, 64)}))
    with pytest.raises(CapaError, match=rf"{name} has shape \[16, 64\], config.json implies \[32, 64\]"):
        streamed(own, "qwen25vl", pictures, tmp_path / "scratch")
    change(own, lambda tensors: tensors.pop(name))
    with pytest.raises(CapaError, match=f"tensor {name} is missing"):
        streamed(own, "qwen25vl", pictures, tmp_path / "scratch")
    name = "model.embed_tokens.weight"
    change(own, lambda tensors: tensors.update({name: tensors[name][:-1]}))
    with pytest.raises(CapaError, match=rf"{name} has shape \[\d+, 64\], config.json implies"):
        streamed(own, "qwen25vl", pictures, tmp_path / "scratch")


def test_a_small_disk_is_refused_before_any_weight_is_read(
    checkpoint: Path, pictures: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, prompter = opened(checkpoint, "qwen25vl")
    prompts = [prompter(sample.question, [sample.image]) for sample in pictures]
    states = sum(4 * 64 * len(prompt.input_ids) for prompt in prompts)
    usage = shutil.disk_usage(tmp_path)._replace(free=states)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(module, "hollow_model", None)
    with pytest.raises(CapaError, match=rf"{tmp_path}: \d+ bytes are needed, {states} are free"):
        calibrate_layerwise(source, prompter, pictures, checkpoint_digest="x", unfinished=UnfinishedSums(tmp_path))


def test_the_disk_takes_no_more_than_was_asked_for(
    checkpoint: Path, pictures: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed: list[int] = []
    used: list[int] = []

    def report(what: str, _done: int, _total: int) -> None:
        if what == "calibrate layer by layer":
            used.append(sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()))

    monkeypatch.setattr(module, "check_disk", lambda _, size: needed.append(size))
    calibrate_layerwise(
        *opened(checkpoint, "qwen25vl"),
        pictures,
        checkpoint_digest="x",
        unfinished=UnfinishedSums(tmp_path),
        report=report,
    )
    # What is there twice for a moment is not, where progress is told.
    spare = tmp_path / "sums.safetensors", *tmp_path.glob("*.hidden")
    twice = spare[0].stat().st_size + max(path.stat().st_size for path in spare[1:])
    assert max(used) <= needed[0] <= max(used) + module._FILE_OVERHEAD * pictures.count + twice


@pytest.mark.parametrize("stage", ["look at pictures", "calibrate layer by layer"])
def test_an_interruption_leaves_the_states_of_each_sample_once(
    checkpoint: Path, pictures: Samples, tmp_path: Path, stage: str
) -> None:
    def interrupt(what: str, done: int, _total: int) -> None:
        if what == stage and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate_layerwise(
            *opened(checkpoint, "qwen25vl"),
            pictures,
            checkpoint_digest="x",
            unfinished=UnfinishedSums(tmp_path),
            report=interrupt,
        )
    left = [path.name.partition(".")[0] for path in tmp_path.glob("*.hidden")]
    assert sorted(left) == [str(index) for index in range(3 if stage == "look at pictures" else 4)]


def test_progress_counts_every_sample_of_every_layer(checkpoint: Path, pictures: Samples, tmp_path: Path) -> None:
    seen: dict[str, list[tuple[int, int]]] = {}

    def report(what: str, done: int, total: int) -> None:
        seen.setdefault(what, []).append((done, total))

    calibrate_layerwise(
        *opened(checkpoint, "qwen25vl"),
        pictures,
        checkpoint_digest="x",
        unfinished=UnfinishedSums(tmp_path),
        report=report,
    )
    assert seen == {
        "measure prompts": [(done, 4) for done in range(5)],
        "look at pictures": [(done, 4) for done in range(5)],
        "calibrate layer by layer": [(done, 20) for done in range(21)],
    }


# How it is chosen.


@pytest.fixture
def building(checkpoint: Path, pictures: Samples, tmp_path: Path) -> Building:
    images = pictures.files[0].parent
    return Building.of(load_recipe("qwen25vl"), Bundle(tmp_path / "out"), checkpoint, images=images)


def test_a_model_that_does_not_fit_is_streamed(
    building: Building, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("capa_export.model.memory.available_memory", lambda: 300_000_000)
    calibration = building.calibrate()
    said = "layer by layer: the model takes 0.5 GB in FP32, 0.3 GB are free"
    assert capsys.readouterr().err.count(said) == 1
    assert "eager" not in vars(building.model)
    assert not list(building.bundle.folder.glob(".partial"))
    # The result is the same, so that it stays current.
    building.again(layer_by_layer=False).calibrate()
    assert "up to date" in capsys.readouterr().err
    shutil.rmtree(building.bundle.folder)
    assert building.again(layer_by_layer=False).calibrate().digest() == calibration.digest()


@pytest.mark.parametrize(("asked", "available"), [(None, 1 << 40), (False, 0), (True, 1 << 40)])
def test_the_option_goes_before_the_memory(
    building: Building, monkeypatch: pytest.MonkeyPatch, *, asked: bool | None, available: int
) -> None:
    monkeypatch.setattr("capa_export.model.memory.available_memory", lambda: available)
    by_layer: list[Calibration] = []

    def remember(*given: Any, **named: Any) -> Calibration:
        by_layer.append(calibrate_layerwise(*given, **named))
        return by_layer[0]

    monkeypatch.setattr(module, "calibrate_layerwise", remember)
    building = building.again(layer_by_layer=asked, samples=1)
    building.calibrate()
    # The eager model is gone again: the stages to come need the memory.
    assert bool(by_layer) == bool(asked) and "eager" not in vars(building.model)


def test_the_options_of_the_command_line(checkpoint: Path, pictures: Samples, tmp_path: Path, capsys: Any) -> None:
    images = str(pictures.files[0].parent)
    words = ["-m", "qwen25vl", "--checkpoint", str(checkpoint), "--images", images, "-o", str(tmp_path / "out")]
    assert main(["calibrate", *words, "--samples", "1", "--layer-by-layer", "--json"]) == 0
    streamed = Calibration.load(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    assert main(["calibrate", *words, "--samples", "1", "--in-memory", "--json"]) == 0
    assert Calibration.load(tmp_path / "out").digest() == streamed.digest()
    capsys.readouterr()
    assert main(["build", *words, "--calibration", str(tmp_path / "out"), "--in-memory"]) == ExitCode.USAGE
    assert "--layer-by-layer or --in-memory has no effect with it" in capsys.readouterr().err
    assert main(["calibrate", "--merge", str(tmp_path / "out"), "-o", "x", "--layer-by-layer"]) == ExitCode.USAGE
    assert "--merge takes calibrations as arguments, and nothing else" in capsys.readouterr().err


def test_the_plan_tells_both(checkpoint: Path) -> None:
    memory = dry_run(load_recipe("qwen25vl"), str(checkpoint), None, "fp16", ffn=True)["memory"]
    parameters = sum(parameter.numel() for parameter in qwen25vl.random_model().parameters())
    assert memory["calibrate"] == calibration_bytes(parameters)
    assert memory["calibrate layer by layer"] - calibration_bytes(0) == 4 * parameters // 5
