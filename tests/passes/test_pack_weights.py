"""Numbers of few bits stand where weights stood, products share what they can, and ONNX Runtime takes them."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from capa_export.base.weight_types import WEIGHT_TYPES
from capa_export.model.quantized.packed import outer_scale, packed_scales, packed_values
from capa_export.model.quantized.weight import QuantizedWeight
from capa_export.passes.pack_weights import (
    PackedForm,
    PackWeightsPass,
    only_gemm_reads,
    outer_name,
    packed_forms,
    packed_name,
    scale_name,
)

T, K, N, GROUP = 5, 64, 48, 32
GRAPH = """
<ir_version: 10, opset_import: ["": 23]>
g (float[T, 64] x, float[48, 64] later, float[48, 64] first, float[48] bias, float[16, 48] whole)
    => (float[T, 48] y, float[16, 48] twice) {
    [n1] q = Gemm <transB = 1> (x, first, bias)
    [n2] k = Gemm <transB = 1> (x, later)
    [n3] y = Add (q, k)
    [n4] z = Gemm <transB = 1> (y, whole)
    [n5] twice = Add (whole, whole)
}
"""


def graph() -> ir.Model:
    model = ir.from_onnx_text(GRAPH)
    for value in model.graph.inputs[1:]:
        model.graph.initializers[str(value.name)] = value
    del model.graph.inputs[1:]
    for node, scope in zip(model.graph, ("q_proj", "k_proj", "sum", "o_proj", "twice"), strict=True):
        node.name = f"layers.0/{scope}/{node.op_type}"
    return model


FORMS = {
    "later": PackedForm(kind="int4", group=GROUP, input_scale="first_input_scale", has_zeros=True),
    "first": PackedForm(kind="int4", group=GROUP, input_scale="first_input_scale", has_zeros=True),
    "of another graph": PackedForm(kind="int4", group=GROUP),
}


def numbers(seed: int) -> dict[str, Any]:
    """The parts of a weight."""
    rng = np.random.default_rng(seed)
    return {
        "packed": rng.integers(-8, 8, (K, N)),
        "scale": rng.uniform(0.01, 0.1, (K // GROUP, N)).astype(np.float32),
        "zero": rng.uniform(-0.3, 0.3, (K // GROUP, N)).astype(np.float32),
    }


def bound(model: ir.Model, values: dict[str, Any]) -> ir.Model:
    for name, array in values.items():
        value = model.graph.initializers[name]
        kept = array.astype(ml_dtypes.int4) if value.dtype == ir.DataType.INT4 else array
        value.const_value = ir.Tensor(kept, dtype=value.dtype, name=name)
    return model


def opened(model: ir.Model, fused: Path) -> onnxruntime.InferenceSession:
    """A session as `run` opens it, which writes what became of the graph."""
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    options.optimized_model_filepath = str(fused)
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def test_products_that_read_the_same_input_share_what_is_made_of_it(tmp_path: Path) -> None:
    model = graph()
    assert PackWeightsPass(FORMS)(model).modified
    shared = ["DequantizeLinear", "Mul", "Reshape", "ReduceSum", "MatMul"]
    own = ["Gemm", "Add"]
    assert operators(model) == [*shared, *own, "DequantizeLinear", "MatMul", *own, "Add", "Gemm", "Add"]
    assert packed_forms(model.graph) == {name: form for name, form in FORMS.items() if name in ("first", "later")}
    assert "whole" in model.graph.initializers
    assert not PackWeightsPass(FORMS)(model).modified

    rng = np.random.default_rng(0)
    factors, bias = rng.uniform(0.5, 2, K).astype(np.float32), rng.standard_normal(N).astype(np.float32)
    parts = {name: numbers(seed) for seed, name in enumerate(("first", "later"))}
    values = {f"{name}_{part}": array for name, own in parts.items() for part, array in own.items()}
    whole = rng.standard_normal((16, N)).astype(np.float32)
    bound(model, {**values, "first_input_scale": factors, "bias": bias, "whole": whole})
    session = opened(model, tmp_path / "fused.onnx")
    x = rng.standard_normal((T, K)).astype(np.float32)
    weights = [
        one["packed"] * np.repeat(one["scale"], GROUP, 0) + np.repeat(one["zero"], GROUP, 0) for one in parts.values()
    ]
    expected = (x * factors) @ (weights[0] + weights[1]) + bias
    (y,) = session.run(["y"], {"x": x})
    assert isinstance(y, np.ndarray)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    fused = [node.op_type for node in onnx.load(tmp_path / "fused.onnx").graph.node]
    assert fused.count("MatMulNBits") == 2 and "DequantizeLinear" not in fused


def test_a_symmetric_weight_needs_one_node_more() -> None:
    model = graph()
    PackWeightsPass({"first": PackedForm(kind="int4", group=GROUP)})(model)
    assert operators(model) == ["DequantizeLinear", "Gemm", "Gemm", "Add", "Gemm", "Add"]
    dequantize, product = list(model.graph)[:2]
    assert dequantize.name == "layers.0/q_proj/DequantizeLinear"
    assert (dequantize.attributes.get_int("axis"), dequantize.attributes.get_int("block_size")) == (0, GROUP)
    assert product.name == "layers.0/q_proj/Gemm" and "transB" not in product.attributes
    assert [(value.name, value.shape) for value in dequantize.inputs if value] == [
        ("first_packed", [K, N]),
        ("first_scale", [K // GROUP, N]),
    ]


@pytest.mark.parametrize(("name", "alone"), [("first", True), ("whole", False)])
def test_what_else_reads_a_weight_keeps_it_whole(name: str, alone: bool) -> None:  # noqa: FBT001 - A parameter of the test.
    assert only_gemm_reads(graph().graph.initializers[name]) is alone


LARGEST = {"int8": (127, 0.01), "fp8": (448, 0.01), "nvfp4": (6, 1)}
"""The largest number of a type, and the largest of its scales."""


@pytest.mark.parametrize("kind", LARGEST)
def test_onnx_runtime_multiplies_with_every_type(kind: Any, tmp_path: Path) -> None:
    rng, (largest, size), form = np.random.default_rng(1), LARGEST[kind], WEIGHT_TYPES[kind]
    values: Any = rng.uniform(-largest, largest, (K, N)).astype(form.array)
    group = form.groups[0] if form.groups else None
    scales = rng.uniform(0.5, 1, (N, K // (group or K))).astype(ml_dtypes.bfloat16).astype(np.float32) * size
    if kind == "nvfp4":
        scales = scales.astype(ml_dtypes.float8_e4m3fn)
    weight = QuantizedWeight(
        kind=kind, read_values=lambda: values.T, scales=scales, group_size=group or K, outer_scale=2.0**-4
    )
    model = graph()
    PackWeightsPass({"first": PackedForm(kind=kind, group=group)})(model)
    assert packed_forms(model.graph) == {"first": PackedForm(kind=kind, group=group)}
    parts = {packed_name: packed_values, scale_name: packed_scales, outer_name: outer_scale}
    stored = {name("first"): read(weight) for name, read in parts.items() if name("first") in model.graph.initializers}
    others = {"bias": np.zeros(N, np.float32), "later": np.zeros((N, K), np.float32)}
    whole = rng.standard_normal((16, N)).astype(np.float32)
    for name, array in {**stored, **others, "whole": whole}.items():
        value = model.graph.initializers[name]
        value.const_value = ir.Tensor(array, dtype=value.dtype, name=name)
    session = opened(model, tmp_path / "fused.onnx")
    x = rng.standard_normal((T, K)).astype(np.float32)
    (y,) = session.run(["y"], {"x": x})
    assert isinstance(y, np.ndarray)
    np.testing.assert_allclose(y, x @ weight.dequantized().T, rtol=1e-4, atol=1e-3)
    fused = [node.op_type for node in onnx.load(tmp_path / "fused.onnx").graph.node]
    # INT8 is multiplied as it is stored, FP8 is dequantized at every run, NVFP4 once, when the file is opened.
    assert (fused.count("MatMulNBits"), fused.count("DequantizeLinear")) == {
        "int8": (1, 0),
        "fp8": (0, 1),
        "nvfp4": (0, 0),
    }[kind]
