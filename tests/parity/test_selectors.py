"""The gates of CAPA hold for every selector: a healthy export passes them, and a wrong choice does not."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from capa_export.config.recipe import Recipe, load_recipe
from capa_export.config.schedule import Prune, Stage
from capa_export.data.samples import samples_from
from capa_export.export.graphs import write_onnx
from capa_export.model.families import qwen25vl
from capa_export.model.prompt import Prompter
from capa_export.model.source import Source
from capa_export.parity.oracle import Oracle
from capa_export.parity.records import Records, write_records
from capa_export.parity.validate import Comparison, compare_onnx
from capa_export.selectors.selector import load_selector, selectors
from tests.conftest import noise
from tests.parity.test_validate import failures

SCALES = {3: np.linspace(1.5, 0.6, 64)}
STEPS = 2


def recipe(name: str) -> Recipe:
    layer = {} if load_selector(name).place == "input" else {"layer": 2}
    prune = Prune(schedule=(Stage(selector=name, ratio=0.6, **layer),))
    return load_recipe("qwen25vl").model_copy(update={"prune": prune})


def made(source: Source, model: Any, prompter: Prompter, name: str, folder: Path) -> tuple[Oracle, Records]:
    """The graphs in both precisions, and what the eager model makes of two pictures."""
    prune = recipe(name).prune
    pruning: Any = {"prune_layers": list(prune.selectors), "selectors": prune.selectors, "scales": SCALES}
    for precision in ("fp16", "fp32"):
        write_onnx(source, precision, folder / precision, **pruning)
    oracle = Oracle(
        model=model,
        family=qwen25vl,
        prompter=prompter,
        prune=prune,
        scales=SCALES,
        precision="fp16",
        onnx=folder / "fp16",
        fp32_onnx=folder / "fp32",
        eos_token_ids=(2,),
    )
    (folder / "pictures").mkdir()
    for index, size in enumerate(((140, 140), (84, 168))):
        noise(*size, index).save(folder / "pictures" / f"{index}.png")
    (folder / "records").mkdir()
    samples = samples_from(folder / "pictures", recipe(name), 2, split="held_out")
    return oracle, write_records(folder / "records", oracle, samples, STEPS)


def worst_chosen(folder: Path) -> None:
    """Score everything the other way round."""
    model = ir.load(folder / "llm/prefill.onnx")
    for node in [node for node in model.graph if node.op_type == "TopKKeep"]:
        scores = node.inputs[0]
        assert scores is not None
        negated = ir.node("Neg", [scores], outputs=[ir.Value(name="negated")])
        bound = ir.node("Constant", [], {"value": ir.tensor(np.float32(-np.inf))}, outputs=[ir.Value(name="text")])
        is_text = ir.node("Equal", [negated.outputs[0], bound.outputs[0]], outputs=[ir.Value(name="is_text")])
        again = ir.node("Where", [is_text.outputs[0], scores, negated.outputs[0]], outputs=[ir.Value(name="reversed")])
        model.graph.insert_before(node, [negated, bound, is_text, again])
        node.replace_input_with(0, again.outputs[0])
    ir.save(model, folder / "llm/prefill.onnx")


@pytest.mark.parametrize("name", selectors())
def test_a_healthy_export_passes_and_the_worst_choice_does_not(
    source: Source, model: Any, prompter: Prompter, name: str, tmp_path: Path
) -> None:
    oracle, records = made(source, model, prompter, name, tmp_path)
    compared = {
        precision: compare_onnx(tmp_path / precision, precision, records, recipe(name))
        for precision in ("fp32", "fp16")
    }
    assert {precision: failures(one) for precision, one in compared.items()} == {"fp32": [], "fp16": []}
    (stage,) = compared["fp32"].selection[0].stages
    assert (stage.selector, stage.layer) == (name, oracle.prune.schedule[0].layer)
    assert stage.iou_mean == 1
    graded = load_selector(name).graded
    assert (stage.margin_min is not None) == graded
    assert np.shape(records.noise.iou) == (1, 2)
    assert np.shape(records.noise.tie_iou) == ((0,) if graded else (1, 2))

    wrong = shutil.copytree(tmp_path / "fp32", tmp_path / "wrong")
    worst_chosen(wrong)
    found = compare_onnx(wrong, "fp32", records, recipe(name))
    # What it computes from the right tokens is right.
    assert not failures(Comparison(found.export_error))
    assert any("kept-set IoU" in failure for failure in failures(found))
