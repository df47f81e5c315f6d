"""A healthy export passes, flips and numeric drift are told apart, and engines are held to the same gates."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from capa_export.config.recipe import Recipe, load_recipe
from capa_export.config.schedule import Prune, Stage
from capa_export.data.samples import Samples, samples_from
from capa_export.export.graphs import write_onnx
from capa_export.model.families import qwen25vl
from capa_export.model.prompt import Prompt, Prompter
from capa_export.model.source import Source
from capa_export.parity.oracle import Oracle
from capa_export.parity.records import Records, write_records
from capa_export.parity.validate import (
    Comparison,
    compare_dense,
    compare_engine,
    compare_onnx,
    compare_prompts,
    make_replay,
)
from capa_export.report.schema import ExportError, Selection
from capa_export.run.onnx import OnnxModel, Sessions
from tests.conftest import noise

SCALES = {1: np.linspace(0.5, 1.5, 64), 3: np.linspace(1.5, 0.6, 64)}
PRUNE = Prune(schedule=(Stage(layer=2, ratio=0.75),))
RECIPE = load_recipe("qwen25vl").model_copy(update={"prune": PRUNE})
STEPS = 4


@pytest.fixture(scope="module")
def oracle(model: Any, source: Source, prompter: Prompter, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    folder = tmp_path_factory.mktemp("validate")
    for precision in ("fp16", "fp32"):
        write_onnx(source, precision, folder / precision, prune_layers=(2,), scales=SCALES, dense=precision == "fp32")
    return Oracle(
        model=model,
        family=qwen25vl,
        prompter=prompter,
        prune=PRUNE,
        scales=SCALES,
        precision="fp16",
        onnx=folder / "fp16",
        fp32_onnx=folder / "fp32",
        eos_token_ids=(2,),
    )


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    folder = tmp_path_factory.mktemp("pictures")
    for index, size in enumerate(((224, 224), (140, 196), (84, 336))):
        noise(*size, index).save(folder / f"{index}.png")
    return samples_from(folder, RECIPE, 3, split="held_out")


@pytest.fixture(scope="module")
def records(oracle: Oracle, samples: Samples, tmp_path_factory: pytest.TempPathFactory) -> Records:
    return write_records(tmp_path_factory.mktemp("records"), oracle, samples, STEPS)


def failures(compared: Comparison) -> list[str]:
    rows: list[ExportError | Selection] = [*compared.export_error, *compared.selection]
    return [check.failure for row in rows for check in row.checks if check.failure]


def figure(row: ExportError | Selection, name: str) -> float:
    (value,) = (check.value for check in row.checks if check.name == name)
    assert value is not None
    return value


def test_a_healthy_export_passes(oracle: Oracle, records: Records) -> None:
    opened: Sessions = {}
    dense = compare_dense(oracle, records, RECIPE, sessions=opened)
    shared = dict(opened)
    assert set(shared) == {"visual/model.onnx", "llm/decode.onnx"}
    fp32 = compare_onnx(oracle.fp32_onnx, "fp32", records, RECIPE, sessions=opened)
    assert set(opened) == {*shared, "llm/prefill.onnx"} and opened.items() >= shared.items()
    fp16 = compare_onnx(oracle.onnx, "fp16", records, RECIPE)
    assert [failures(one) for one in (dense, fp32, fp16)] == [[], [], []]
    assert [row.reference for row in fp16.export_error] == ["eager CAPA fp32", "eager CAPA fp16"]
    exact, half = fp32.export_error[0], fp16.export_error[0]
    assert exact.steps == 3 * STEPS and figure(exact, "same tokens") == 3
    for name in ("relative error", "hidden norm ratio", "features norm ratio"):
        assert 0 < figure(exact, name) < 1e-5 < figure(half, name) < 0.05
    assert [layer.layer for layer in half.layers] == [0, 1, 2, 3, 4]
    for layer, plain in zip(half.layers, exact.layers, strict=True):
        assert plain.noise == 0 and plain.relative_error is not None and plain.relative_error < 1e-5
        assert layer.noise and layer.relative_error and 0.3 < layer.relative_error / layer.noise < 2
    (kept,) = fp32.selection[0].stages
    assert (kept.layer, kept.iou_min, kept.flipped) == (2, 1, 0)
    assert kept.margin_min is not None and 0 < kept.margin_min < 1
    assert set(fp16.milliseconds) == {"prefill", "decode"}


@pytest.mark.parametrize("replayed", [8, 0])
def test_flips_and_numeric_drift_are_told_apart(
    oracle: Oracle, records: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replayed: int
) -> None:
    """A graph that scores wrongly: the right numbers where it is made to keep the right tokens, on every prompt."""
    monkeypatch.setattr("capa_export.parity.validate._REPLAYED", replayed)
    folder = shutil.copytree(oracle.fp32_onnx, tmp_path / "onnx")
    model = ir.load(folder / "llm/prefill.onnx")
    score = next(node for node in model.graph if node.op_type == "ContributionScore")
    identity = ir.node("Constant", [], {"value": ir.tensor(np.eye(64, dtype=np.float32))})
    identity.outputs[0].name = "identity"
    model.graph.insert_before(score, identity)
    score.replace_input_with(3, identity.outputs[0])
    ir.save(model, folder / "llm/prefill.onnx")
    compared = compare_onnx(folder, "fp32", records, RECIPE)
    assert not failures(Comparison(compared.export_error))
    (row,) = compared.selection
    assert row.stages[0].flipped > 0
    assert {check.name for check in row.checks if check.failure} == {"kept-set IoU", "furthest flip", "score error"}


class OtherRuntime(OnnxModel):
    """In the place of engines, which need a GPU."""

    gpu = SimpleNamespace(name="Other")

    def check(self, prompts: Sequence[Prompt], num_keep: Sequence[Sequence[int]], new_tokens: int) -> None:
        """Its profile takes what the graphs take."""
        assert len(prompts) == len(num_keep) == 1 and new_tokens == STEPS


@pytest.mark.parametrize("live", [True, False], ids=["eager", "golden"])
@pytest.mark.parametrize("ratio", [0.75, 0.5])
def test_engines_are_held_to_the_same_gates(oracle: Oracle, records: Records, ratio: float, *, live: bool) -> None:
    """A runtime that keeps twice as many tokens: where the eager model can follow, its logits are still right."""

    class KeepsMore(OtherRuntime):
        def prefill(self, prompt: Prompt, num_keep: Sequence[int], embeds: Any = None) -> Any:
            stages = [Stage(layer=2, ratio=ratio)]
            return super().prefill(prompt, Prune(schedule=tuple(stages)).num_keep(prompt.image_lengths), embeds)

    engine: Any = KeepsMore(oracle.onnx, threads=1)
    replay = make_replay(oracle) if live else None
    compared = compare_engine(engine, oracle.onnx, "fp16", records, RECIPE, replay)
    rows = {row.reference: row for row in compared.export_error}
    assert figure(rows["fp16 ONNX"], "relative error") < 1e-6
    assert not failures(Comparison(compared.export_error))
    assert "The engines ran on Other." in compared.notes
    if ratio == 0.75:
        assert not failures(compared)
        assert set(rows) == {"eager CAPA fp32", "eager CAPA fp16", "fp16 ONNX"}
        assert rows["eager CAPA fp32"].prompts == 3
    else:
        assert "furthest flip" in " ".join(failures(compared))
        assert set(rows) == ({"eager CAPA fp32", "fp16 ONNX"} if live else {"fp16 ONNX"})
        assert any("On 3 of 3 prompts" in note for note in compared.notes) == (not live)


def test_the_bundles_own_processor_makes_the_prompts(
    checkpoint: Path, source: Source, prompter: Prompter, samples: Samples, tmp_path: Path
) -> None:
    assert not failures(compare_prompts(prompter, prompter, samples))
    folder = shutil.copytree(checkpoint, tmp_path / "changed")
    path = folder / "preprocessor_config.json"
    path.write_text(path.read_text().replace("0.48145466", "0.48"))
    changed = Prompter(folder, folder, qwen25vl, source.dims)
    assert "3 of 3 differ" in failures(compare_prompts(prompter, changed, samples))[0]


def test_decode_at_the_pruned_positions_fails(oracle: Oracle, records: Records) -> None:
    """The positions of the answer are the eager model's own, not those the graphs are fed."""

    class Continues(OnnxModel):
        def step(self, cache: Any, token: int, position: int) -> Any:
            return super().step(cache, token, position - 5)

    engine = _as_engine(Continues(oracle.fp32_onnx))
    compared = compare_engine(engine, oracle.fp32_onnx, "fp32", records, RECIPE)
    assert any("against eager CAPA fp32: relative error" in failure for failure in failures(compared))


def _as_engine(model: Any) -> Any:
    model.gpu, model.check = SimpleNamespace(name="Other"), lambda *_: None
    return model


def test_measuring_the_noise_leaves_the_reference_as_it_was(
    oracle: Oracle, samples: Samples, records: Records, tmp_path: Path
) -> None:
    tensors = {**dict(oracle.model.named_parameters()), **dict(oracle.model.named_buffers())}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    again = write_records(tmp_path, replace(oracle, precision="bf16"), samples, STEPS)
    assert again.noise.logits > records.noise.logits > 0
    assert all(a > b > 0 for a, b in zip(again.noise.hidden, records.noise.hidden, strict=True))
    assert all((tensor == before[name]).all() for name, tensor in tensors.items())


def test_recipe_of_two_stages(model: Any, source: Source, prompter: Prompter, samples: Samples, tmp_path: Path) -> None:
    prune = Prune(schedule=(Stage(layer=1, ratio=0.5), Stage(layer=3, ratio=0.8)))
    recipe: Recipe = RECIPE.model_copy(update={"prune": prune})
    write_onnx(source, "fp16", tmp_path / "onnx", prune_layers=(1, 3), scales={})
    oracle = Oracle(
        model=model,
        family=qwen25vl,
        prompter=prompter,
        prune=prune,
        scales={},
        precision="fp16",
        onnx=tmp_path / "onnx",
        fp32_onnx=tmp_path / "onnx",
        eos_token_ids=(2,),
    )
    (tmp_path / "records").mkdir()
    records = write_records(tmp_path / "records", oracle, samples, 2)
    compared = compare_onnx(oracle.onnx, "fp16", records, recipe)
    assert not failures(compared)
    assert [stage.layer for stage in compared.selection[0].stages] == [1, 3]
    assert len(records.noise.scores) == 2
    record = next(iter(records))
    assert record.fp32.hidden is not None
    # A dropped row has no state behind the layer that dropped it.
    gone = ~np.isin(record.rows, record.fp32.kept[0])
    states = record.fp32.hidden[:, : len(record.rows)]
    assert gone.any() and np.isnan(states[1:, gone]).all() and not np.isnan(states[0]).any()

    class KeepsMoreAtFirst(OtherRuntime):
        def check(self, prompts: Sequence[Prompt], num_keep: Sequence[Sequence[int]], new_tokens: int) -> None:
            assert new_tokens == 2

        def prefill(self, prompt: Prompt, num_keep: Sequence[int], embeds: Any = None) -> Any:
            return super().prefill(prompt, [num_keep[0] + 1, *num_keep[1:]], embeds)

    engine: Any = KeepsMoreAtFirst(oracle.onnx, threads=1)
    held = compare_engine(engine, oracle.onnx, "fp16", records, recipe)
    assert [stage.layer for stage in held.selection[0].stages] == [1]
    assert [
        warning for warning in held.warnings if "what capa keeps after layer 3 was not compared on 3 of 3" in warning
    ]
