"""A bf16 graph as FP32, with the values of its bf16 weights: ONNX Runtime's CPU provider has no bf16 kernels."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

__all__ = ["WidenBF16Pass", "tensor_values", "widen"]

_BF16, _FP32 = ir.DataType.BFLOAT16, ir.DataType.FLOAT


def widen(source: Path, target: Path) -> None:
    """Write the graph at `source` to `target`, every bf16 value FP32; weights stream into `<target>.data`."""
    model = ir.load(source)
    WidenBF16Pass()(model)
    target.parent.mkdir(parents=True, exist_ok=True)
    ir.save(model, target, external_data=f"{target.name}.data")


class WidenBF16Pass(ir.passes.InPlacePass):
    """Makes every bf16 value of the graph FP32; weights are converted when they are asked for.

    Requires that no function of the model is written for bf16. Ensures that no value, attribute or cast of the graph is
    bf16.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for value in model.graph.initializers.values():
            if value.const_value is not None and value.const_value.dtype == _BF16:
                value.const_value = _widened(value.const_value)
                modified = True
        for node in model.graph:
            for name, attribute in node.attributes.items():
                if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == _BF16:
                    node.attributes[name] = ir.AttrTensor(name, _widened(attribute.as_tensor()))
                    modified = True
                elif (node.op_type, name) == ("Cast", "to") and attribute.as_int() == _BF16:
                    node.attributes[name] = ir.AttrInt64(name, _FP32)
                    modified = True
        everything = [*model.graph.inputs, *model.graph.initializers.values()]
        for value in [*everything, *(output for node in model.graph for output in node.outputs)]:
            if value.dtype == _BF16:
                value.type = ir.TensorType(_FP32)
                modified = True
        return ir.passes.PassResult(model, modified=modified)


def tensor_values(tensor: ir.TensorProtocol) -> Any:
    """The numbers of a tensor; mapped, not read, where they lie in a file of their own."""
    if not isinstance(tensor, ir.ExternalTensor) or tensor.dtype.bitwidth < 8:
        return tensor.numpy()
    # Its own reader refuses files with several hard links, which is what weights in place are.
    return np.memmap(tensor.path, tensor.dtype.numpy(), "r", tensor.offset or 0, tuple(tensor.shape.numpy()))


def _widened(tensor: ir.TensorProtocol) -> ir.LazyTensor:
    def convert() -> ir.TensorProtocol:
        return ir.tensor(tensor_values(tensor).astype("float32"), name=tensor.name)

    return ir.LazyTensor(convert, _FP32, ir.Shape(tensor.shape.numpy()), name=tensor.name)
