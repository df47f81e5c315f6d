"""Products that share an input read parts of it, and give what they gave."""

import numpy as np
import onnx_ir as ir
import onnxruntime

from capa_export.passes.distinct_inputs import DistinctInputsPass

GRAPH = """
<ir_version: 10, opset_import: ["": 23]>
g (float16[T, 32] x, int8[32, 8] a_packed, int8[32, 8] b_packed, int8[32, 8] c_packed, float16 a_scale_2,
   float16 b_scale_2, float16 c_scale_2) => (float16[T, 8] a, float16[T, 8] b, float16[T, 8] c) {
    [n1] wa = DequantizeLinear (a_packed, a_scale_2)
    [n2] a = Gemm (x, wa)
    [n3] wb = DequantizeLinear (b_packed, b_scale_2)
    [n4] b = Gemm (x, wb)
    [n5] wc = DequantizeLinear (c_packed, c_scale_2)
    [n6] c = Gemm (x, wc)
}
"""


def test_no_two_products_read_the_same_and_all_give_the_same() -> None:
    model, rng = ir.from_onnx_text(GRAPH), np.random.default_rng(0)
    for value in model.graph.inputs[1:]:
        numbers = rng.integers(-127, 128, (32, 8)).astype(np.int8)
        array = numbers if value.dtype == ir.DataType.INT8 else np.float16(2.0**-9)
        value.const_value = ir.tensor(array, name=value.name)
        model.graph.initializers[str(value.name)] = value
    del model.graph.inputs[1:]
    for node in model.graph:
        node.name = f"{str(node.outputs[0].name)[-1]}/{node.op_type}"
    x = rng.standard_normal((3, 32)).astype(np.float16)

    def run() -> list[np.ndarray]:
        options = onnxruntime.SessionOptions()
        # By default, what enters a product is rounded to INT8.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        session = onnxruntime.InferenceSession(
            ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        return [np.asarray(output) for output in session.run(None, {"x": x})]

    before = run()
    assert DistinctInputsPass()(model).modified
    for own, right in zip(run(), before, strict=True):
        np.testing.assert_array_equal(own, right)
    products = [node for node in model.graph if node.op_type == "Gemm"]
    assert len({node.inputs[0] for node in products}) == 3
    assert not DistinctInputsPass()(model).modified
