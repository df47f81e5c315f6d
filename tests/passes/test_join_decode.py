"""Prefill that is decode as well: what it computes as either, and what TensorRT-RTX makes of it."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from capa_export.export.graphs import write_onnx
from capa_export.graph.contract import CACHE_ROWS, is_past, is_present, past_name
from capa_export.model.source import Source
from capa_export.passes.join_decode import JoinDecodePass, filled
from capa_export.passes.lower import LowerPass
from capa_export.selectors.selector import SelectorChoice, load_selector, selectors
from tests.models import FAMILIES
from tests.passes.test_cache_blocks import feeds, new_rows
from tests.passes.test_lower import IMPORTED, JETPACK_6, TOLERANCES, Graphs, assert_close, graphs, inputs, run
from tests.products import once_each

__all__ = ["graphs"]


def joined(folder: Path, *, lowered: bool = False) -> Path:
    """The graph, beside prefill and over its weights."""
    model = ir.load(folder / "llm/prefill.onnx")
    assert JoinDecodePass()(model).modified
    assert not lowered or LowerPass(JETPACK_6)(model).modified
    out = folder / "llm" / ("lowered-joined.onnx" if lowered else "joined.onnx")
    ir.save(model, out)
    return out


def of_a_prompt(path: Path, prompt: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A prompt behind caches of which no row counts, whatever finite numbers stand there."""
    feed = filled(ir.load(path).graph.inputs, prompt)
    return {name: np.full_like(array, 19) if is_past(name) else array for name, array in feed.items()}


def of_a_token(path: Path, step: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A token behind caches, as a prompt of one: no visual token is kept, and that which there is is text."""
    return filled(ir.load(path).graph.inputs, step)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_is_what_prefill_makes_of_it(graphs: Graphs, family: str, precision: str) -> None:
    folder = graphs(family, precision)
    prompt = inputs(folder / "llm/prefill.onnx")
    expected = run(folder / "llm/prefill.onnx", prompt)
    actual = run(path := joined(folder), of_a_prompt(path, prompt))
    assert actual.keys() == expected.keys()
    # To the last bit: its own part counts 1, and the cache gives 0.
    assert_close(actual, expected, 0)


@pytest.mark.parametrize(
    ("family", "lowered", "precision", "tolerance"), once_each(FAMILIES, [False, True], TOLERANCES.items())
)
def test_a_token_is_what_decode_makes_of_it(
    graphs: Graphs,
    family: str,
    lowered: bool,  # noqa: FBT001
    precision: str,
    tolerance: float,
) -> None:
    folder = graphs(family, precision)
    plain, blocks = feeds(folder / "llm/decode.onnx", prompts=1)
    expected = run(folder / "llm/decode.onnx", plain)
    actual = run(path := joined(folder, lowered=lowered), of_a_token(path, blocks))
    assert_close(actual, new_rows(expected), tolerance)
    kept = [value for name, value in actual.items() if name not in expected]
    assert all(value.tolist() == [0] for value in kept)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_but_attention_reads_the_cache(graphs: Graphs, family: str) -> None:
    path = joined(graphs(family, "fp16"), lowered=True)
    onnx.checker.check_model(str(path), full_check=True)
    graph = ir.load(path).graph
    assert {node.op_type for node in graph if node.domain == ""} <= IMPORTED
    pasts = [value for value in graph.inputs if is_past(str(value.name))]
    assert all({use.node.op_type for use in value.uses()} <= {"Reshape", "Shape", "MatMul", "Cast"} for value in pasts)
    assert {value.name for value in pasts} == {
        past_name(str(one.name)) for one in graph.outputs if is_present(one.name)
    }
    shapes = {str(value.name): [str(size) for size in value.shape][2] for value in pasts}
    assert shapes["past_key_values.0.key"] == "past_blocks"
    assert all(value.shape[3] == CACHE_ROWS for value in pasts)


def test_a_second_run_changes_nothing(graphs: Graphs) -> None:
    model = ir.load(joined(graphs("qwen25vl", "fp16")))
    text = ir.to_proto(model).SerializeToString()
    assert not JoinDecodePass()(model).modified
    assert ir.to_proto(model).SerializeToString() == text


@pytest.mark.parametrize(
    "selector",
    [
        # One for each place that a selector may have, and one that looks for tokens unlike each other.
        pytest.param(name, marks=() if name in {"capa", "capa-mmr", "cdpruner", "feather"} else pytest.mark.exhaustive)
        for name in selectors()
    ],
)
def test_every_selector_keeps_the_one_token_of_a_step(source: Source, tmp_path: Path, selector: str) -> None:
    layer = -1 if load_selector(selector).place == "input" else 2
    chosen = {layer: SelectorChoice(selector)}
    write_onnx(source, "fp32", tmp_path, prune_layers=(layer,), scales={}, selectors=chosen)
    plain, blocks = feeds(tmp_path / "llm/decode.onnx", prompts=1)
    expected = run(tmp_path / "llm/decode.onnx", plain)
    path = joined(tmp_path)
    actual = run(path, of_a_token(path, blocks))
    assert_close(actual, new_rows(expected), 1e-6)
    assert actual["kept_positions.0"].tolist() == [0]
