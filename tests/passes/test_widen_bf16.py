"""bf16 graphs as FP32: every value, and the numbers that the bf16 weights hold."""

import ml_dtypes
import numpy as np
import onnx_ir as ir

from capa_export.passes.widen_bf16 import WidenBF16Pass

GRAPH = """
<ir_version: 10, opset_import: ["": 24]>
g (bfloat16[T, 4] x, int64[1] axis) => (bfloat16[T, 4] y) {
    two = Constant <value = bfloat16[1] {16384}> ()
    wide = Cast <to = 1> (x)
    narrow = Cast <to = 16> (wide)
    weighted = Mul (narrow, weight)
    y = Mul (weighted, two)
}
"""


def _model() -> ir.Model:
    model = ir.from_onnx_text(GRAPH.replace("int64[1] axis", "bfloat16[4] weight"))
    (weight,) = (value for value in model.graph.inputs if value.name == "weight")
    model.graph.inputs.remove(weight)
    weight.const_value = ir.Tensor(np.array([0.1, 1, 2, 3e38]).astype(ml_dtypes.bfloat16), name="weight")
    model.graph.register_initializer(weight)
    return model


def test_nothing_is_bf16_any_more() -> None:
    model = _model()
    assert WidenBF16Pass()(model).modified
    text = ir.to_onnx_text(model, exclude_initializers=True)
    assert "bfloat16" not in text and "<to: int = 16>" not in text
    (weight,) = model.graph.initializers.values()
    assert weight.const_value is not None
    stored = np.array([0.1, 1, 2, 3e38]).astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(weight.const_value.numpy(), stored)


def test_a_second_run_changes_nothing() -> None:
    model = _model()
    WidenBF16Pass()(model)
    before = ir.to_proto(model).SerializeToString()
    assert not WidenBF16Pass()(model).modified
    assert ir.to_proto(model).SerializeToString() == before
