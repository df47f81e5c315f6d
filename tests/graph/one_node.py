"""One node of the domain, with its ONNX body, on ONNX Runtime."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime

from capa_export.graph.functions import DOMAIN, FUNCTIONS
from capa_export.graph.opset import IR_VERSION, OPSET

__all__ = ["one_node", "run"]


def one_node(
    name: str, dtypes: Sequence[ir.DataType], shapes: Sequence[Sequence[int | str]], **attributes: Any
) -> ir.Model:
    """A model of inputs x0, x1 ... and outputs y0, y1 ... around one node."""
    values = [
        ir.Value(name=f"x{i}", type=ir.TensorType(dtype), shape=ir.Shape(shape))
        for i, (dtype, shape) in enumerate(zip(dtypes, shapes, strict=True))
    ]
    node = ir.node(name, values, attributes or None, domain=DOMAIN, num_outputs=len(FUNCTIONS[name].outputs))
    out = {"ContributionScore": ir.DataType.FLOAT, "TopKKeep": ir.DataType.INT64}
    for i, output in enumerate(node.outputs):
        output.name, output.type = f"y{i}", ir.TensorType(out.get(name, dtypes[i]))
    graph = ir.Graph(values, node.outputs, nodes=[node], opset_imports={"": OPSET, DOMAIN: 1}, name="one")
    return ir.Model(graph, ir_version=IR_VERSION, functions=[FUNCTIONS[name]])


def run(name: str, inputs: Sequence[np.ndarray], **attributes: Any) -> Any:
    """The output, or a list of them where there are several."""
    dtypes = [ir.DataType.from_numpy(x.dtype) for x in inputs]
    model = one_node(name, dtypes, [x.shape for x in inputs], **attributes)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    outputs = session.run(None, {f"x{i}": x for i, x in enumerate(inputs)})
    return outputs[0] if len(outputs) == 1 else outputs
