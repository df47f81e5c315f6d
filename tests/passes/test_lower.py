"""Graphs for older TensorRT: what they compute, in which operators, and what TensorRT-RTX makes of them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from capa_export.export.graphs import write_onnx
from capa_export.graph.contract import is_kept
from capa_export.model.checkpoint import open_checkpoint
from capa_export.model.families import load_family
from capa_export.model.source import Source
from capa_export.passes.lower import LowerPass
from capa_export.trt.engines import build_graphs
from tests.models import FAMILIES
from tests.products import once_each
from tests.targets import one_gpu

JETPACK_6 = (10, 3)
GRAPHS = ("llm/prefill", "llm/decode", "visual/model")
SIZES = {"sequence": 40, "batch": 2, "step": 3, "past": 17, "frames": 1, "rows": 4, "cols": 6, "tiles": 2}
# Text in front and behind; the pruning stages keep 20, and 9 of those.
VALUES: dict[str, Any] = {
    "text_positions": [*range(4), *range(32, 40)],
    "num_keep": [20, 9],
    "past_lengths": [[17, 11], [9, 8], [9, 6]],
}

# Of those in the operator list of onnx-tensorrt 10.1, the ones our graphs and the bodies of their functions need.
IMPORTED = {
    "Abs",
    "Add",
    "And",
    "Cast",
    "CastLike",
    "Concat",
    "Constant",
    "Cos",
    "Div",
    "Equal",
    "Expand",
    "Gather",
    "Gelu",
    "Gemm",
    "Greater",
    "Identity",
    "IsInf",
    "IsNaN",
    "LayerNormalization",
    "Less",
    "MatMul",
    "Max",
    "Min",
    "Mul",
    "Not",
    "Or",
    "Pad",
    "Range",
    "ReduceMean",
    "ReduceSum",
    "ReduceSumSquare",
    "Relu",
    "Reshape",
    "ScatterElements",
    "ScatterND",
    "Shape",
    "Sigmoid",
    "Sin",
    "Size",
    "Slice",
    "Softmax",
    "Split",
    "Sqrt",
    "Squeeze",
    "Sub",
    "Transpose",
    "Unsqueeze",
    "Where",
}

Graphs = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Graphs:
    """The ONNX files of a small random model of a family, each precision written once."""
    made: dict[tuple[str, str], Path] = {}
    checkpoints: dict[str, Path] = {}

    def write(family: str, precision: str) -> Path:
        if family not in checkpoints:
            small = FAMILIES[family]
            checkpoints[family] = small.save_model(tmp_path_factory.mktemp(family), small.random_model())
        if (family, precision) not in made:
            source = Source.of(open_checkpoint(str(checkpoints[family])), load_family(family))
            folder = tmp_path_factory.mktemp(f"{family}-{precision}")
            stages = (1, 3) if family == "qwen25vl" else (2,)
            scales = {3: np.linspace(0.5, 1.5, source.dims.decoder.hidden_size)}
            write_onnx(source, precision, folder, prune_layers=stages, scales=scales)
            made[family, precision] = folder
        return made[family, precision]

    return write


def lowered(path: Path) -> Path:
    """The lowered graph, beside the original and over its weights."""
    model = ir.load(path)
    assert LowerPass(JETPACK_6)(model).modified
    out = path.with_name(f"lowered-{path.name}")
    ir.save(model, out)
    return out


def inputs(path: Path) -> dict[str, np.ndarray]:
    """Random numbers where any will do."""
    random = np.random.default_rng(0)
    result: dict[str, np.ndarray] = {}
    for value in ir.load(path).graph.inputs:
        # Caches behind a pruning stage have 9 rows.
        shape = [size if isinstance(size, int) else SIZES.get(str(size.value), 9) for size in value.shape]
        if value.name == "position_ids":
            result[value.name] = np.broadcast_to(np.arange(shape[-1]), shape).astype(np.int64)
        elif value.name in VALUES:
            given = np.array(VALUES[value.name], np.int64)
            result[value.name] = given if value.name == "text_positions" else given[: shape[0]]
        else:
            result[value.name] = random.standard_normal(shape).astype(value.dtype.numpy())
    return result


def run(path: Path, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_outputs()]
    return dict(zip(names, session.run(names, feed), strict=True))


def assert_close(actual: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], tolerance: float) -> None:
    """That outputs are as expected, within a tolerance relative to the largest number; kept positions are equal."""
    for name, value in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (value.dtype, value.shape), name
        error = np.abs(actual[name].astype(np.float64) - value.astype(np.float64)).max()
        limit = 0 if is_kept(name) else tolerance * np.abs(value).max()
        assert error <= limit, f"{name}: {error:.2e} > {limit:.2e}"


TOLERANCES = {"fp32": 1e-6, "fp16": 2e-3}
"""FP32: the same operations, summed in another order. FP16: both round after softmax, norms and rotation, where ONNX
Runtime's own kernels round once less; the last layers' caches have gone through all of them."""


@pytest.mark.parametrize(("family", "graph", "precision", "tolerance"), once_each(FAMILIES, GRAPHS, TOLERANCES.items()))
def test_computes_the_same(graphs: Graphs, family: str, graph: str, precision: str, tolerance: float) -> None:
    path = graphs(family, precision) / f"{graph}.onnx"
    feed = inputs(path)
    expected, actual = run(path, feed), run(lowered(path), feed)
    assert expected.keys() == actual.keys()
    assert_close(actual, expected, tolerance)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_is_written_in_what_older_versions_import(graphs: Graphs, family: str, graph: str, precision: str) -> None:
    path = lowered(graphs(family, precision) / f"{graph}.onnx")
    onnx.checker.check_model(str(path), full_check=True)
    model = ir.load(path)
    used = {node.op_type for node in model.graph if node.domain == ""}
    bodies = {node.op_type for function in model.functions.values() for node in function}
    assert used | bodies <= IMPORTED
    imports = [model.graph.opset_imports, *(function.opset_imports for function in model.functions.values())]
    assert {versions[""] for versions in imports} == {20}
    assert model.ir_version == 10


def test_a_second_run_changes_nothing(graphs: Graphs) -> None:
    model = ir.load(graphs("qwen25vl", "fp16") / "llm" / "prefill.onnx")
    assert LowerPass(JETPACK_6)(model).modified
    text = ir.to_proto(model).SerializeToString()
    assert not LowerPass(JETPACK_6)(model).modified
    assert ir.to_proto(model).SerializeToString() == text


def test_newer_versions_get_the_graph_as_it_is(graphs: Graphs) -> None:
    model = ir.load(graphs("qwen25vl", "fp16") / "llm" / "prefill.onnx")
    text = ir.to_proto(model).SerializeToString()
    assert not LowerPass((10, 15))(model).modified
    assert ir.to_proto(model).SerializeToString() == text


def test_names_lead_to_the_node_that_was(graphs: Graphs) -> None:
    path = graphs("qwen25vl", "fp16") / "llm" / "prefill.onnx"
    before = {node.name: [output.name for output in node.outputs] for node in ir.load(path).graph}
    after = {node.name: [output.name for output in node.outputs] for node in ir.load(lowered(path)).graph}
    assert {"model/layers.3/self_attn/Attention/Softmax", "model/norm/RMSNormalization/Sqrt"} <= set(after)
    new = set(after) - set(before)
    assert all(name.rpartition("/")[0] in before for name in new)
    # Whoever asks for a value of the original finds it.
    values = {name for outputs in after.values() for name in outputs}
    assert {name for outputs in before.values() for name in outputs} <= values
    others = {name for node in new for name in after[node]} - {name for outputs in before.values() for name in outputs}
    assert all(name.rpartition("/")[0] in new for name in others)


def test_a_function_of_the_callers_keeps_its_body(graphs: Graphs) -> None:
    model = ir.load(graphs("qwen25vl", "fp16") / "llm" / "prefill.onnx")
    before = {function.name for function in model.functions.values()}
    LowerPass(JETPACK_6)(model)
    assert {function.name for function in model.functions.values()} == before


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_norms_of_large_values_do_not_overflow(dtype: type, tmp_path: Path) -> None:
    """Squares of 60,000 are beyond FP16."""
    name = ir.DataType.from_numpy(np.dtype(dtype)).name.lower()
    model = ir.from_onnx_text(
        f"""<ir_version: 11, opset_import: ["": 23]>
        norm ({name}[rows, 64] x, {name}[64] scale) => ({name}[rows, 64] y) {{
            y = RMSNormalization <axis = -1, epsilon = 1e-6, stash_type = 1> (x, scale)
        }}"""
    )
    LowerPass(JETPACK_6)(model)
    ir.save(model, tmp_path / "norm.onnx")
    x = np.full((2, 64), 6e4).astype(dtype)
    if dtype is np.float16:
        y = run(tmp_path / "norm.onnx", {"x": x, "scale": np.ones(64, dtype)})["y"]
    else:
        # ONNX Runtime has no kernels for it on a CPU; ONNX's own evaluator has.
        y = onnx.reference.ReferenceEvaluator(str(tmp_path / "norm.onnx")).run(
            None, {"x": x, "scale": np.ones(64, dtype)}
        )[0]
    np.testing.assert_array_equal(y.astype(np.float32), 1)


@pytest.mark.trt
@pytest.mark.slow
@pytest.mark.parametrize(("family", "graph"), once_each(FAMILIES, ["llm/prefill", "visual/model"]))
def test_builds_with_every_attention_in_one_kernel(graphs: Graphs, family: str, graph: str, tmp_path: Path) -> None:
    path = graphs(family, "fp16") / f"{graph}.onnx"
    num_attentions = sum(node.op_type == "Attention" for node in ir.load(path).graph)
    older, out = lowered(path), tmp_path / "engines"
    built = build_graphs(older.parent, {older.name: "lowered"}, out, one_gpu(), weights="embedded")["lowered"]
    assert built["weight_copies"] == 0
    assert (out / "lowered.layers.json").read_text(encoding="utf-8").count("mha_v") >= num_attentions
