"""The parity gates pass a healthy export and fail every planted fault."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from capa_export.eager import Eager
from capa_export.export import Source, write_onnx
from capa_export.families import qwen25vl
from capa_export.parity import Comparison, Trace, restored
from capa_export.prompt import Prompt, Prompter
from capa_export.recipe import Prune, Stage, load_recipe
from capa_export.runtime import OnnxModel
from capa_export.samples import samples_from
from capa_export.subject import Subject
from capa_export.validate import compare_onnx, eager_trace, precision_noise, validate
from tests.conftest import noise

SCALES = {1: np.linspace(0.5, 1.5, 64), 3: np.linspace(1.5, 0.6, 64)}
RECIPE = load_recipe("qwen25vl")


@pytest.fixture(scope="module")
def subject(model: Any, source: Source, prompter: Prompter, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    folder = tmp_path_factory.mktemp("validate")
    for precision in ("fp16", "fp32"):
        write_onnx(source, precision, folder / precision, prune_layers=(2,), scales=SCALES, dense=precision == "fp32")
    return Subject(
        model=model,
        family=qwen25vl,
        prompter=prompter,
        prune=Prune(schedule=(Stage(layer=2, ratio=0.75),)),
        scales=SCALES,
        precision="fp16",
        onnx=folder / "fp16",
        fp32_onnx=folder / "fp32",
        eos_token_ids=(2,),
    )


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for index, size in enumerate(((224, 224), (140, 196), (84, 336))):
        noise(*size, index).save(folder / f"{index}.png")
    return folder


def test_a_healthy_export_passes(subject: Subject, pictures: Path) -> None:
    prompts = samples_from(pictures, RECIPE, 6, split="held_out", repeat=True)
    recipe = RECIPE.model_copy(update={"parity": RECIPE.parity.model_copy(update={"steps": 4})})
    parity, examples = validate(subject, recipe, prompts, samples_from(pictures, RECIPE, 3, split="held_out"))
    assert [len(example.kept[0].kept) for example in examples] == [16, 9, 9]
    assert parity["passed"], parity["failures"]
    dense, fp32, fp16 = parity["export_error"]
    assert dense["kept_iou_min"] == fp32["kept_iou_min"] == 1
    assert fp32["same_tokens"] == 6 and fp32["steps"] == 24
    assert 0 < fp32["relative_error"] < fp16["relative_error"] < 0.05
    assert fp16["precision_noise"] > 0
    assert set(parity["method_error"]["kl_from_dense"]) == {"capa", "random"}
    assert "accuracy" not in parity["method_error"]


def nodes(model: ir.Model, op_type: str) -> Iterator[ir.Node]:
    return (node for node in model.graph if node.op_type == op_type)


def set_weight(model: ir.Model, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    value = model.graph.initializers[name]
    assert value.const_value is not None
    value.const_value = ir.tensor(change(value.const_value.numpy().copy()), name=name)


def constant(model: ir.Model, array: np.ndarray) -> ir.Value:
    value = ir.Value(name="fault", type=ir.TensorType(ir.DataType.from_numpy(array.dtype)), shape=ir.Shape(array.shape))
    value.const_value = ir.tensor(array, name="fault")
    model.graph.register_initializer(value)
    return value


def alpha_dropped(model: ir.Model) -> None:
    set_weight(model, "model.layers.1.visual_scale", np.ones_like)


def alpha_of_another_layer(model: ir.Model) -> None:
    set_weight(model, "model.layers.1.visual_scale", lambda alpha: SCALES[3].astype(alpha.dtype))


def gather_off_by_one(model: ir.Model) -> None:
    node = next(nodes(model, "TokenGather"))
    kept = node.inputs[5]
    assert kept is not None
    # 0 becomes -1, which ONNX reads as the last row.
    before = ir.node("Sub", [kept, constant(model, np.array(1))])
    before.outputs[0].name, before.outputs[0].type = "fault/output", kept.type
    model.graph.insert_before(node, before)
    node.replace_input_with(5, before.outputs[0])


def heads_swapped(model: ir.Model) -> None:
    swap = np.r_[16:32, 0:16, 32:64]
    set_weight(model, "model.layers.3.self_attn.o_proj.weight", lambda w: np.ascontiguousarray(w[:, swap]))


def scores_without_output_weight(model: ir.Model) -> None:
    node = next(nodes(model, "ContributionScore"))
    weight = node.inputs[3]
    assert weight is not None
    assert weight.dtype is not None
    node.replace_input_with(3, constant(model, np.eye(64, dtype=weight.dtype.numpy())))


def text_rows_not_merged(model: ir.Model) -> None:
    node = next(nodes(model, "VisualScale"))
    scaled = ir.node("Mul", list(node.inputs[:2]))
    scaled.outputs[0].name, scaled.outputs[0].type = "fault/output", node.outputs[0].type
    model.graph.insert_before(node, scaled)
    node.outputs[0].replace_all_uses_with(scaled.outputs[0])


def causal_mask_lost(model: ir.Model) -> None:
    for node in nodes(model, "Attention"):
        node.attributes["is_causal"] = ir.AttrInt64("is_causal", 0)


def nan_weight(model: ir.Model) -> None:
    set_weight(model, "model.norm.weight", lambda w: np.where(np.arange(64) == 5, np.nan, w).astype(w.dtype))


def vision_rows_shifted(model: ir.Model) -> None:
    set_weight(model, "visual.merger.mlp.2.weight", lambda w: np.ascontiguousarray(np.roll(w, 1, axis=0)))


FAULTS = [
    ("llm/prefill.onnx", alpha_dropped),
    ("llm/prefill.onnx", alpha_of_another_layer),
    ("llm/prefill.onnx", gather_off_by_one),
    ("llm/prefill.onnx", heads_swapped),
    ("llm/prefill.onnx", scores_without_output_weight),
    ("llm/prefill.onnx", text_rows_not_merged),
    ("llm/prefill.onnx", causal_mask_lost),
    ("llm/prefill.onnx", nan_weight),
    ("llm/decode.onnx", heads_swapped),
    ("llm/decode.onnx", nan_weight),
    ("visual/model.onnx", vision_rows_shifted),
]


@pytest.fixture(scope="module")
def measured(subject: Subject, pictures: Path) -> Any:
    eager = Eager(subject.model)
    samples = samples_from(pictures, RECIPE, 3, split="held_out")
    prompts = [subject.prompter(sample.question, [sample.image]) for sample in samples]
    references = [eager_trace(subject, eager, prompt, subject.plan(prompt), 3) for prompt in prompts]
    noises = {
        precision: precision_noise(subject, precision, prompts, references) for precision in ("fp32", "fp16", "bf16")
    }
    return eager, prompts, references, noises


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(("file", "fault"), FAULTS, ids=[f"{file.split('/')[1]}-{f.__name__}" for file, f in FAULTS])
def test_a_planted_fault_fails_the_gate(
    subject: Subject, measured: Any, tmp_path: Path, file: str, fault: Callable[[ir.Model], None], precision: str
) -> None:
    good = subject.fp32_onnx if precision == "fp32" else subject.onnx
    for part in ("llm", "visual"):
        (tmp_path / part).mkdir()
        for path in (good / part).iterdir():
            (tmp_path / part / path.name).symlink_to(path)
    model = ir.load(good / file)
    ir.external_data.load_to_model(model)
    fault(model)
    (tmp_path / file).unlink()
    ir.save(model, tmp_path / file)
    eager, prompts, references, noises = measured
    gate, noise = getattr(RECIPE.parity, precision), noises[precision]
    assert compare_onnx(subject, precision, tmp_path, eager, prompts, references, noise).failures(gate)
    assert not compare_onnx(subject, precision, good, eager, prompts, references, noise).failures(gate)


class OtherRuntime(OnnxModel):
    """In the place of engines, which need a GPU."""

    gpu = SimpleNamespace(name="Other")

    def check(self, prompts: Sequence[Prompt], num_keep: Sequence[Sequence[int]], new_tokens: int) -> None:
        """Its profile takes what the graphs take."""
        assert len(prompts) == len(num_keep)


@pytest.mark.parametrize(
    ("file", "fault"),
    [(None, None), ("llm/decode.onnx", heads_swapped), ("llm/prefill.onnx", scores_without_output_weight)],
)
def test_engines_are_held_to_the_same_gates(
    subject: Subject, pictures: Path, tmp_path: Path, file: str | None, fault: Callable[[ir.Model], None] | None
) -> None:
    folder = shutil.copytree(subject.onnx, tmp_path / "onnx")
    if file is not None and fault is not None:
        model = ir.load(folder / file)
        ir.external_data.load_to_model(model)
        fault(model)
        ir.save(model, folder / file)
    prompts = samples_from(pictures, RECIPE, 3, split="held_out")
    recipe = RECIPE.model_copy(update={"parity": RECIPE.parity.model_copy(update={"steps": 3})})
    engine: Any = OtherRuntime(folder, threads=1)
    parity, _ = validate(subject, recipe, prompts, prompts, engine=engine)
    onnx, *engines = parity["export_error"][2:]
    assert (onnx["artefact"], onnx["failures"]) == ("fp16 ONNX", [])
    assert (engines[0]["artefact"], engines[0]["reference"]) == ("fp16 engine", "eager CAPA fp32")
    assert engines[0]["gate"] == onnx["gate"]
    note = next(note for note in parity["notes"] if "engines ran on Other" in note)
    if fault is None:
        assert parity["passed"]
        assert engines[0] | {"artefact": "fp16 ONNX"} == onnx
        assert (engines[1]["reference"], engines[1]["difference"], engines[1]["prompts"]) == ("fp16 ONNX", 0, 3)
    else:
        assert not parity["passed"]
        assert any(failure.startswith("fp16 engine against eager") for failure in parity["failures"])
    # Where other tokens are kept, the eager model alone says what is right.
    same = 3 - engines[0]["prompts_with_flips"]
    assert (same < 3) == (fault is scores_without_output_weight)
    assert f"on {same} of 3 prompts" in note
    assert [one["prompts"] for one in engines] == [3, same][: 1 + bool(same)]


def test_decode_at_the_pruned_positions_fails(subject: Subject, measured: Any) -> None:
    """The positions of the answer are the eager model's own, not those the graphs are fed."""
    eager, prompts, references, _ = measured
    wrong = [replace(prompt, next_position=prompt.next_position - 5) for prompt in prompts]
    compared = compare_onnx(subject, "fp32", subject.fp32_onnx, eager, wrong, references, 0.0)
    assert compared.failures(RECIPE.parity.fp32)


def test_measuring_the_noise_leaves_the_reference_as_it_was(subject: Subject, measured: Any) -> None:
    _, prompts, references, noises = measured
    tensors = {**dict(subject.model.named_parameters()), **dict(subject.model.named_buffers())}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    assert precision_noise(subject, "bf16", prompts, references) == noises["bf16"] > noises["fp16"] > 0
    assert all((tensor == before[name]).all() for name, tensor in tensors.items())


def test_top1_counts_where_the_margin_is_clear() -> None:
    comparison = Comparison("fp16 ONNX", "eager", noise=0.01)
    wanted = np.array([[3.0, 1.0, -2.0]], np.float32)
    comparison.add(Trace(np.array([[1.0, 3.0, -2.0]], np.float32), []), Trace(wanted, []), 0)
    failures = " ".join(comparison.failures(RECIPE.parity.fp16))
    assert "cosine" in failures
    assert "top-1 differs at 1 of 1" in failures


def test_no_gate_is_met_by_saying_nothing() -> None:
    assert "no prompt" in " ".join(Comparison("x", "y").failures(RECIPE.parity.bf16))
    same = Trace(np.array([[3.0, 1.0]]), [])
    for level, message in ((float("nan"), "overflows"), (float("inf"), "overflows"), (5.0, "no step has a margin")):
        comparison = Comparison("x", "y", level)
        comparison.add(same, same, 0)
        assert message in " ".join(comparison.failures(RECIPE.parity.bf16))


def test_a_nan_never_passes() -> None:
    comparison = Comparison("x", "y")
    comparison.add(Trace(np.array([[1.0, np.nan]]), []), Trace(np.array([[1.0, 2.0]]), []), 0)
    comparison.add(Trace(np.array([[1.0, 2.0]]), []), Trace(np.array([[1.0, 2.0]]), []), 0)
    assert len(comparison.failures(RECIPE.parity.bf16)) >= 2
    row = json.loads(json.dumps(comparison.as_dict(RECIPE.parity.bf16), allow_nan=False))
    assert row["cosine"] is None
    assert restored(row)["cosine"] == -np.inf


def test_iou_leaves_text_out_and_flips_belong_at_the_cut() -> None:
    comparison = Comparison("x", "y")
    logits = np.ones((1, 4)) + np.arange(4)
    scores = np.array([np.inf, np.inf, 9, 1, 2, 4, 3, 0, 5.0, np.inf])
    own, wanted = [np.array([0, 1, 5, 9])], [np.array([0, 1, 8, 9])]
    comparison.add(Trace(logits, own), Trace(logits, own), 3, flipped=Trace(logits, wanted, [scores]))
    assert comparison.kept_iou == [0.0]
    assert comparison.replayed == 1
    assert comparison.flip_distance == pytest.approx(0.2)
    assert "outscores" in " ".join(comparison.failures(RECIPE.parity.fp16))
