"""Puts INT4 numbers behind a graph's matrix products in the place of weights.

T = tokens, K = inputs, N = outputs, G = groups of inputs that share a scale.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

__all__ = [
    "PackWeightsPass",
    "PackedForm",
    "input_scale_name",
    "only_gemm_reads",
    "packed_forms",
    "packed_name",
    "scale_name",
    "zero_name",
]

_PACKED, _SCALE, _INPUT_SCALE, _ZERO = "_packed", "_scale", "_input_scale", "_zero"


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedForm:
    """How a weight is packed."""

    group: int
    """Inputs that share a scale."""
    input_scale: str | None = None
    """Initializer [K] that the input is multiplied with; several weights may have the same."""
    has_zeros: bool = False
    """Whether groups have zero points."""


def packed_name(weight: str) -> str:
    """Name of the initializer of a weight's INT4 numbers [K, N]."""
    return weight + _PACKED


def scale_name(weight: str) -> str:
    """Name of the initializer of their scales [G, N]."""
    return weight + _SCALE


def input_scale_name(weight: str) -> str:
    """Name of the initializer of what the input is multiplied with, [K]."""
    return weight + _INPUT_SCALE


def zero_name(weight: str) -> str:
    """Name of the initializer of what a zero stands for, [G, N]: to be added for every input of a group."""
    return weight + _ZERO


def packed_forms(graph: ir.Graph) -> dict[str, PackedForm]:
    """The forms of the weights in whose places INT4 numbers stand in a graph."""
    forms: dict[str, PackedForm] = {}
    for name, value in graph.initializers.items():
        if name.endswith(_PACKED) and value.dtype == ir.DataType.INT4:
            weight = name.removesuffix(_PACKED)
            dequantize = _reader(value)
            scaled = _input(_reader(dequantize.outputs[0]), 0).producer()
            before = [] if scaled is None else [str(one.name) for one in scaled.inputs if one is not None]
            forms[weight] = PackedForm(
                group=dequantize.attributes.get_int("block_size", 0),
                input_scale=next((one for one in before if one.endswith(_INPUT_SCALE)), None),
                has_zeros=zero_name(weight) in graph.initializers,
            )
    return forms


def only_gemm_reads(value: ir.Value) -> bool:
    """Whether all readers of a weight take it as B of a `Gemm(transB=1)`."""
    uses = value.uses()
    return bool(uses) and all(
        use.idx == 1 and use.node.op_type == "Gemm" and use.node.attributes.get_int("transB", 0) == 1 for use in uses
    )


class PackWeightsPass(ir.passes.InPlacePass):
    """Puts INT4 numbers [K, N] and a `DequantizeLinear` in the place of weights [N, K].

    Blocks lie along the inputs, which is what ONNX Runtime and TensorRT multiply with as it is stored; the product
    keeps its name. TensorRT knows no zero points: what they add is the sum of a group's inputs times what a zero stands
    for, which is added behind the product. Products that read the same input share these sums, and the input scaled.

    Requires a graph without its weights, of which each of those in question is read by one `Gemm(transB=1)`. Ensures
    that the new initializers have the weight's name with an ending, no values yet, and but for the numbers its dtype.

    Args:
        forms: by the name of a weight; those of other graphs do nothing.
    """

    def __init__(self, forms: Mapping[str, PackedForm]) -> None:
        super().__init__()
        self.forms = forms

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        place = {node: index for index, node in enumerate(graph)}
        found = [name for name in self.forms if name in graph.initializers]
        # What products share is computed before the first of them.
        found.sort(key=lambda name: place[_reader(graph.initializers[name])])
        shared: dict[tuple[ir.Value, object], ir.Value] = {}
        for name in found:
            _pack(graph, name, self.forms[name], shared)
        return ir.passes.PassResult(model, modified=bool(found))


def _pack(graph: ir.Graph, name: str, form: PackedForm, shared: dict[tuple[ir.Value, object], ir.Value]) -> None:
    weight = graph.initializers.pop(name)
    assert only_gemm_reads(weight) and weight.const_value is None and weight.shape is not None
    num_outputs, num_inputs = weight.shape.numpy()
    num_groups = num_inputs // form.group
    assert num_groups * form.group == num_inputs, (name, form)
    product = _reader(weight)
    scope = str(product.name).rpartition("/")[0]
    wide = weight.type
    numbers, scales = (
        _initializer(graph, *one)
        for one in (
            (packed_name(name), ir.TensorType(ir.DataType.INT4), [num_inputs, num_outputs]),
            (scale_name(name), wide, [num_groups, num_outputs]),
        )
    )

    def add(operator: str, *inputs: ir.Value, behind: bool = False, **attributes: int) -> ir.Value:
        node_name = f"{scope}/{operator}"
        made = ir.Value(name=f"{node_name}/output_0", type=wide)
        node = ir.node(operator, list(inputs), attributes, name=node_name, outputs=[made])
        (graph.insert_after if behind else graph.insert_before)(product, node)
        return made

    whole = add("DequantizeLinear", numbers, scales, axis=0, block_size=form.group)
    whole.shape = numbers.shape
    product.replace_input_with(1, whole)
    product.attributes.pop("transB")
    given = _input(product, 0)
    if form.input_scale is not None:
        if (given, form.input_scale) not in shared:
            factors = graph.initializers.get(form.input_scale) or _initializer(
                graph, form.input_scale, wide, [num_inputs]
            )
            shared[given, form.input_scale] = add("Mul", given, factors)
        given = shared[given, form.input_scale]
        product.replace_input_with(0, given)
    if form.has_zeros:
        zeros = _initializer(graph, zero_name(name), wide, [num_groups, num_outputs])
        if (given, form.group) not in shared:
            by_group = _constant(graph, f"{scope}/groups", [-1, num_groups, form.group])
            axis = _constant(graph, f"{scope}/last_axis", [-1])
            shared[given, form.group] = add("ReduceSum", add("Reshape", given, by_group), axis, keepdims=0)
        added = add("MatMul", shared[given, form.group], zeros)
        own = product.outputs[0]
        users = tuple(own.uses())
        total = add("Add", own, added, behind=True)
        for use in users:
            use.node.replace_input_with(use.idx, total)


def _initializer(graph: ir.Graph, name: str, kind: ir.TypeProtocol | None, shape: list[int]) -> ir.Value:
    value = ir.Value(name=name, type=kind, shape=ir.Shape(shape))
    graph.initializers[name] = value
    return value


def _constant(graph: ir.Graph, name: str, numbers: list[int]) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.tensor(numbers, name=name, dtype=ir.DataType.INT64))
    graph.register_initializer(value)
    return value


def _reader(value: ir.Value) -> ir.Node:
    (use,) = value.uses()
    return use.node


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value
