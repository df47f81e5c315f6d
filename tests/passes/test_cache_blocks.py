"""Decode as engines run it: what it computes, and what TensorRT-RTX reads and copies of its cache."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from capa_export.graph.contract import CACHE_ROWS, is_cache, is_past, is_present, past_name
from capa_export.passes.cache_blocks import CacheBlocksPass, step_shapes
from capa_export.passes.lower import LowerPass
from capa_export.trt.engines import build_graphs
from tests.models import FAMILIES
from tests.passes.test_lower import IMPORTED, JETPACK_6, TOLERANCES, Graphs, assert_close, graphs, run
from tests.products import once_each
from tests.targets import one_gpu

__all__ = ["graphs"]

LENGTHS = np.array([[300, 11], [9, 8], [9, 6]])
"""Of two prompts in front of the pruning stages and behind each; the first takes two blocks."""


def in_blocks(path: Path, *, lowered: bool = False) -> Path:
    """Decode for engines, beside the original and over its weights."""
    model = ir.load(path)
    assert CacheBlocksPass()(model).modified
    assert not lowered or LowerPass(JETPACK_6)(model).modified
    out = path.with_name("lowered-blocks.onnx" if lowered else "blocks.onnx")
    ir.save(model, out)
    return out


def feeds(path: Path, prompts: int = 2) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The same random step for decode as it is exported, and for engines."""
    lengths = LENGTHS[:, :prompts]
    random = np.random.default_rng(0)
    plain: dict[str, np.ndarray] = {}
    blocks: dict[str, np.ndarray] = {}
    graph = ir.load(path).graph
    (stages,) = (value.shape[0] for value in graph.inputs if value.name == "past_lengths")
    for value in graph.inputs:
        if value.name == "past_lengths":
            plain[value.name] = blocks[value.name] = lengths[:stages]
        elif value.name == "position_ids":
            positions = np.array([[700], [400]])[:prompts]
            plain[value.name] = blocks[value.name] = np.broadcast_to(positions, (value.shape[0], prompts, 1)).copy()
        elif not is_past(value.name):
            rows = random.standard_normal((prompts, 1, value.shape[2])).astype(value.dtype.numpy())
            plain[value.name] = blocks[value.name] = rows
        else:
            _, heads, length, head_size = value.shape
            own = lengths[{"past": 0, "past_kept_0": 1, "past_kept_1": 2}[str(length.value)]]
            count = -(-own.max() // CACHE_ROWS)
            dtype = value.dtype.numpy()
            # Whatever finite numbers stand where no rows count.
            plain[value.name] = np.full((prompts, heads, own.max(), head_size), 37, dtype)
            blocks[value.name] = np.full((prompts, heads, count * CACHE_ROWS, head_size), -53, dtype)
            for index, rows in enumerate(own):
                cached = random.standard_normal((heads, rows, head_size)).astype(dtype)
                plain[value.name][index, :, own.max() - rows :] = cached
                blocks[value.name][index, :, :rows] = cached
            blocks[value.name] = blocks[value.name].reshape(prompts, heads, count, CACHE_ROWS, head_size)
    return plain, blocks


def new_rows(outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What decode returns as engines do, of what it returns as it is exported."""
    return {name: value[:, :, -1:] if is_present(name) else value for name, value in outputs.items()}


# As of lowered graphs: FP32 sums in another order, and FP16 rounds after softmax where ONNX Runtime's kernels do not.
@pytest.mark.parametrize(
    ("family", "lowered", "precision", "tolerance"), once_each(FAMILIES, [False, True], TOLERANCES.items())
)
def test_computes_what_decode_does(
    graphs: Graphs,
    family: str,
    lowered: bool,  # noqa: FBT001
    precision: str,
    tolerance: float,
) -> None:
    path = graphs(family, precision) / "llm/decode.onnx"
    plain, blocks = feeds(path)
    expected, actual = run(path, plain), run(in_blocks(path, lowered=lowered), blocks)
    assert expected.keys() == actual.keys()
    assert_close(actual, new_rows(expected), tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_but_attention_reads_the_cache(graphs: Graphs, family: str) -> None:
    path = graphs(family, "fp16") / "llm/decode.onnx"
    model = ir.load(in_blocks(path, lowered=True))
    used = {node.op_type for node in model.graph if node.domain == ""}
    assert used <= IMPORTED
    onnx.checker.check_model(str(path.with_name("lowered-blocks.onnx")), full_check=True)
    pasts = [value for value in model.graph.inputs if is_past(str(value.name))]
    readers = {value.name: {use.node.op_type for use in value.uses()} for value in pasts}
    # Elementwise where a KV head has one query head; block by block in a product where it has more.
    assert all(types <= {"Reshape", "Shape", "MatMul", "Cast"} for types in readers.values())
    outputs = {value.name for value in model.graph.outputs}
    assert {value.name for value in pasts} == {past_name(name) for name in outputs if is_present(name)}


def test_shapes_are_known_without_the_graph(graphs: Graphs) -> None:
    """By whoever feeds an engine, of which only the exported graph is there."""
    path = graphs("qwen25vl", "fp16") / "llm/decode.onnx"
    shapes = step_shapes(ir.load(path).graph)
    made = step_shapes(ir.load(in_blocks(path)).graph)
    assert {name: shape for name, shape in shapes.items() if is_cache(name)} == {
        name: shape for name, shape in made.items() if is_cache(name)
    }
    assert shapes["past_key_values.1.key"] == ("batch", 2, "past_kept_0_blocks", CACHE_ROWS, 16)
    assert shapes["present.1.key"] == ("batch", 2, 1, 16)
    assert shapes["inputs_embeds"][1] == 1


def test_what_is_no_decode_stays(graphs: Graphs) -> None:
    for graph in ("llm/prefill.onnx", "visual/model.onnx"):
        model = ir.load(graphs("qwen25vl", "fp16") / graph)
        before = ir.to_proto(model).SerializeToString()
        assert not CacheBlocksPass()(model).modified
        assert ir.to_proto(model).SerializeToString() == before


def test_a_second_run_changes_nothing(graphs: Graphs) -> None:
    model = ir.load(in_blocks(graphs("qwen25vl", "fp16") / "llm/decode.onnx"))
    assert not CacheBlocksPass()(model).modified


@pytest.mark.trt
@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "lowered"),
    [
        # One with as many KV heads as query heads lowered, and one with fewer as it is.
        pytest.param(
            *(family, lowered),
            marks=() if (family, lowered) in {("llava15", True), ("qwen25vl", False)} else pytest.mark.exhaustive,
        )
        for lowered in (False, True)
        for family in FAMILIES
    ],
)
def test_no_layer_copies_a_cache(graphs: Graphs, family: str, tmp_path: Path, *, lowered: bool) -> None:
    """As it is exported, and as kits have it for older TensorRT."""
    path = graphs(family, "fp16") / "llm/decode.onnx"
    if lowered:
        path = in_blocks(path, lowered=True)
    built = build_graphs(path.parent, {path.name: "decode"}, tmp_path / "out", one_gpu(), weights="embedded")["decode"]
    assert (built["weight_copies"], built["cache_copies"]) == (0, 0)
    layers = json.loads((tmp_path / "out" / "decode.layers.json").read_text(encoding="utf-8"))
    read = [tensor["name"] for layer in layers for tensor in layer["inputs"] if is_past(tensor["name"])]
    pasts = [str(value.name) for value in ir.load(path).graph.inputs if is_past(str(value.name))]
    assert sorted(read) == sorted(pasts), "each is read by one layer"
