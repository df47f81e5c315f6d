"""INT4 numbers stand where weights stood, what products share is computed once, and ONNX Runtime fuses them."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from capa_export.passes.pack_weights import PackedForm, PackWeightsPass, only_gemm_reads, packed_forms

T, K, N, GROUP = 5, 64, 48, 32
GRAPH = """
<ir_version: 10, opset_import: ["": 24]>
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
    "later": PackedForm(group=GROUP, input_scale="first_input_scale", has_zeros=True),
    "first": PackedForm(group=GROUP, input_scale="first_input_scale", has_zeros=True),
    "of another graph": PackedForm(group=GROUP),
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
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    options.optimized_model_filepath = str(tmp_path / "fused.onnx")
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
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
    PackWeightsPass({"first": PackedForm(group=GROUP)})(model)
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
