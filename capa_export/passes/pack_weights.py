"""Puts INT4 numbers behind a graph's matrix products in the place of weights."""

from collections.abc import Mapping

import onnx_ir as ir

__all__ = ["PackWeightsPass", "only_gemm_reads", "packed_groups", "packed_name", "scale_name"]

_PACKED, _SCALE = "_packed", "_scale"


def packed_name(weight: str) -> str:
    """Name of the initializer of a weight's INT4 numbers [in, out]."""
    return weight + _PACKED


def scale_name(weight: str) -> str:
    """Name of the initializer of their scales [groups, out]."""
    return weight + _SCALE


def packed_groups(graph: ir.Graph) -> dict[str, int]:
    """Inputs of a group, by the weights whose places INT4 numbers have in a graph."""
    groups: dict[str, int] = {}
    for name, value in graph.initializers.items():
        if name.endswith(_PACKED) and value.dtype == ir.DataType.INT4:
            (use,) = value.uses()
            groups[name.removesuffix(_PACKED)] = use.node.attributes.get_int("block_size", 0)
    return groups


def only_gemm_reads(value: ir.Value) -> bool:
    """Whether all readers of a weight take it as B of a `Gemm(transB=1)`."""
    uses = value.uses()
    return bool(uses) and all(
        use.idx == 1 and use.node.op_type == "Gemm" and use.node.attributes.get_int("transB", 0) == 1 for use in uses
    )


class PackWeightsPass(ir.passes.InPlacePass):
    """Puts INT4 numbers [in, out] and a `DequantizeLinear` in the place of weights [out, in].

    Blocks lie along the inputs, which is what ONNX Runtime and TensorRT multiply with as it is stored; of the product,
    the name, the inputs and the outputs stay.

    Requires a graph without its weights, of which those in question are read by `Gemm(transB=1)` alone. Ensures that
    numbers and scales have the weight's name with an ending, and no values yet; scales have the weight's dtype.

    Args:
        groups: inputs that share a scale, by the name of a weight; those of other graphs do nothing.
    """

    def __init__(self, groups: Mapping[str, int]) -> None:
        super().__init__()
        self.groups = groups

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        found = [name for name in self.groups if name in graph.initializers]
        for name in found:
            _pack(graph, name, self.groups[name])
        return ir.passes.PassResult(model, modified=bool(found))


def _pack(graph: ir.Graph, name: str, group: int) -> None:
    weight = graph.initializers.pop(name)
    assert only_gemm_reads(weight) and weight.const_value is None and weight.shape is not None
    num_outputs, num_inputs = weight.shape.numpy()
    assert num_inputs % group == 0, (name, group)
    scales = ir.Value(name=scale_name(name), type=weight.type, shape=ir.Shape([num_inputs // group, num_outputs]))
    shape = ir.Shape([num_inputs, num_outputs])
    numbers = ir.Value(name=packed_name(name), type=ir.TensorType(ir.DataType.INT4), shape=shape)
    for value in (scales, numbers):
        assert value.name is not None
        graph.initializers[value.name] = value
    products = [use.node for use in weight.uses()]
    node_name = f"{str(products[0].name).rpartition('/')[0]}/DequantizeLinear"
    whole = ir.Value(name=f"{node_name}/output_0", type=weight.type, shape=shape)
    attributes = {"axis": 0, "block_size": group}
    node = ir.node("DequantizeLinear", [numbers, scales], attributes, name=node_name, outputs=[whole])
    graph.insert_before(products[0], node)
    for product in products:
        product.replace_input_with(1, whole)
        product.attributes.pop("transB")
