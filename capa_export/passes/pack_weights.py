"""Puts numbers of few bits behind a graph's matrix products in the place of weights.

T = tokens, K = inputs, N = outputs, G = groups of inputs that share a scale.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from capa_export.base.weight_types import WEIGHT_TYPES, NumberKind
from capa_export.graph.functions import DOMAIN, FP4_GROUP, FP4_WEIGHT

__all__ = [
    "PackWeightsPass",
    "PackedForm",
    "input_scale_name",
    "only_gemm_reads",
    "outer_name",
    "packed_forms",
    "packed_name",
    "scale_name",
    "zero_name",
]

_PACKED, _SCALE, _OUTER, _INPUT_SCALE, _ZERO = "_packed", "_scale", "_scale_2", "_input_scale", "_zero"
_KINDS: Mapping[ir.DataType, NumberKind] = {
    ir.DataType.INT4: "int4",
    ir.DataType.INT8: "int8",
    ir.DataType.FLOAT8E4M3FN: "fp8",
    ir.DataType.UINT8: "nvfp4",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedForm:
    """How a weight is packed."""

    kind: NumberKind
    group: int | None
    """Inputs that share a scale; None where all inputs of an output do."""
    input_scale: str | None = None
    """Initializer [K] that the input is multiplied with; several weights may have the same."""
    has_zeros: bool = False
    """Whether groups have zero points."""


def packed_name(weight: str) -> str:
    """Name of the initializer of a weight's numbers [K, N]; those of NVFP4 lie two an octet, [K, N/2]."""
    return weight + _PACKED


def scale_name(weight: str) -> str:
    """Name of the initializer of their scales [G, N], or [N] where all inputs share one."""
    return weight + _SCALE


def outer_name(weight: str) -> str:
    """Name of the initializer of the one scale of all scales."""
    return weight + _OUTER


def input_scale_name(weight: str) -> str:
    """Name of the initializer of what the input is multiplied with, [K]."""
    return weight + _INPUT_SCALE


def zero_name(weight: str) -> str:
    """Name of the initializer of what a zero stands for, [G, N]: to be added for every input of a group."""
    return weight + _ZERO


def packed_forms(graph: ir.Graph) -> dict[str, PackedForm]:
    """The forms of the weights in whose places numbers of few bits stand in a graph."""
    forms: dict[str, PackedForm] = {}
    for name, value in graph.initializers.items():
        kind = None if value.dtype is None else _KINDS.get(value.dtype)
        if name.endswith(_PACKED) and kind is not None:
            weight = name.removesuffix(_PACKED)
            dequantize = _reader(value)
            scaled = _input(_product(dequantize), 0).producer()
            before = [] if scaled is None else [str(one.name) for one in scaled.inputs if one is not None]
            forms[weight] = PackedForm(
                kind=kind,
                group=FP4_GROUP if kind == "nvfp4" else dequantize.attributes.get_int("block_size", 0) or None,
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
    """Puts numbers [K, N] of few bits and a `DequantizeLinear` in the place of weights [N, K].

    Blocks lie along the inputs, which is what ONNX Runtime and TensorRT multiply with as it is stored; the product
    keeps its name. Where all inputs of an output share a scale, it stands behind the product: before it, TensorRT would
    dequantize the weight first where there is one row. Nothing has kernels for NVFP4, so a function of standard
    operators dequantizes it. TensorRT knows no zero points: what they add is the sum of a group's inputs times what a
    zero stands for, which is added behind the product. Products that read the same input share these sums, and the
    input scaled.

    Requires a graph without its weights, of which each of those in question is read by one `Gemm(transB=1)`. Ensures
    that the new initializers have the weight's name with an ending, no values yet, and but for the numbers, and NVFP4's
    scales, its dtype.

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
        if any(self.forms[name].kind == "nvfp4" for name in found):
            model.functions[FP4_WEIGHT.identifier()] = FP4_WEIGHT.clone()
            graph.opset_imports.setdefault(DOMAIN, 1)
        return ir.passes.PassResult(model, modified=bool(found))


@dataclass(kw_only=True, slots=True)
class _Product:
    """A product with a weight, around which nodes are put."""

    graph: ir.Graph
    node: ir.Node
    weight: ir.Value
    last: ir.Node
    """The node whose output stands for the product's."""

    def before(
        self, operator: str, *inputs: ir.Value, dtype: ir.DataType | None = None, domain: str = "", **attributes: int
    ) -> ir.Value:
        """What a new node before the product makes, in the weight's dtype unless another is given."""
        node = self._made(operator, inputs, attributes, domain, None if dtype is None else ir.TensorType(dtype))
        self.graph.insert_before(self.node, node)
        return node.outputs[0]

    def behind(self, operator: str, other: ir.Value, place: str = "") -> None:
        """Let a new node stand for the product's output, which computes it with another value."""
        own = self.last.outputs[0]
        users = tuple(own.uses())
        node = self._made(operator, (own, other), {}, "", None, place)
        self.graph.insert_after(self.last, node)
        for use in users:
            use.node.replace_input_with(use.idx, node.outputs[0])
        self.last = node

    def part(self, name: str, shape: list[int], dtype: ir.DataType | None = None) -> ir.Value:
        """An initializer without a value, in the weight's dtype unless another is given."""
        kind = self.weight.type if dtype is None else ir.TensorType(dtype)
        value = ir.Value(name=name, type=kind, shape=ir.Shape(shape))
        self.graph.initializers[name] = value
        return value

    def _made(
        self,
        operator: str,
        inputs: Sequence[ir.Value],
        attributes: Mapping[str, int],
        domain: str,
        kind: ir.TypeProtocol | None,
        place: str = "",
    ) -> ir.Node:
        name = f"{str(self.node.name).rpartition('/')[0]}/{place}{operator}"
        made = ir.Value(name=f"{name}/output_0", type=kind or self.weight.type)
        return ir.node(operator, inputs, attributes, domain=domain, name=name, outputs=[made])


def _pack(graph: ir.Graph, name: str, form: PackedForm, shared: dict[tuple[ir.Value, object], ir.Value]) -> None:
    weight = graph.initializers.pop(name)
    assert only_gemm_reads(weight) and weight.const_value is None and weight.shape is not None
    num_outputs, num_inputs = weight.shape.numpy()
    group = form.group or num_inputs
    num_groups = num_inputs // group
    assert num_groups * group == num_inputs, (name, form)
    node = _reader(weight)
    product = _Product(graph=graph, node=node, weight=weight, last=node)
    whole = _whole_weight(product, name, form, (num_inputs, num_outputs))
    whole.shape = ir.Shape([num_inputs, num_outputs])
    node.replace_input_with(1, whole)
    node.attributes.pop("transB")
    given = _input(node, 0)
    if form.input_scale is not None:
        if (given, form.input_scale) not in shared:
            factors = graph.initializers.get(form.input_scale) or product.part(form.input_scale, [num_inputs])
            shared[given, form.input_scale] = product.before("Mul", given, factors)
        given = shared[given, form.input_scale]
        node.replace_input_with(0, given)
    bias = None
    if form.group is None:
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        node.resize_inputs(2)
        product.behind("Mul", product.part(scale_name(name), [num_outputs]), "scale/")
    if form.has_zeros:
        zeros = product.part(zero_name(name), [num_groups, num_outputs])
        if (given, group) not in shared:
            scope = str(node.name).rpartition("/")[0]
            groups = _constant(graph, f"{scope}/groups", [-1, num_groups, group])
            axis = _constant(graph, f"{scope}/last_axis", [-1])
            by_group = product.before("Reshape", given, groups)
            shared[given, group] = product.before("ReduceSum", by_group, axis, keepdims=0)
        product.behind("Add", product.before("MatMul", shared[given, group], zeros))
    if bias is not None:
        product.behind("Add", bias, "bias/")


def _whole_weight(product: _Product, name: str, form: PackedForm, shape: tuple[int, int]) -> ir.Value:
    """What stands before a product for its weight [K, N], but for the scales of outputs."""
    num_inputs, num_outputs = shape
    if form.kind == "nvfp4":
        numbers = product.part(packed_name(name), [num_inputs, num_outputs // 2], ir.DataType.UINT8)
        scales = product.part(scale_name(name), [num_inputs // FP4_GROUP, num_outputs], ir.DataType.FLOAT8E4M3FN)
        outer = product.part(outer_name(name), [], ir.DataType.FLOAT)
        whole = product.before(FP4_WEIGHT.name, numbers, scales, outer, dtype=ir.DataType.FLOAT, domain=DOMAIN)
        whole.shape = ir.Shape(shape)
        wanted = product.weight.dtype
        assert wanted is not None
        return whole if wanted == ir.DataType.FLOAT else product.before("Cast", whole, to=wanted)
    numbers = product.part(packed_name(name), [*shape], ir.DataType[WEIGHT_TYPES[form.kind].onnx])
    if form.group is None:
        return product.before("DequantizeLinear", numbers, product.part(outer_name(name), []))
    scales = product.part(scale_name(name), [num_inputs // form.group, num_outputs])
    return product.before("DequantizeLinear", numbers, scales, axis=0, block_size=form.group)


def _constant(graph: ir.Graph, name: str, numbers: list[int]) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.tensor(numbers, name=name, dtype=ir.DataType.INT64))
    graph.register_initializer(value)
    return value


def _reader(value: ir.Value) -> ir.Node:
    (use,) = value.uses()
    return use.node


def _product(node: ir.Node) -> ir.Node:
    """The product that multiplies with what a node makes of a weight, whatever casts stand between them."""
    while node.op_type != "Gemm":
        node = _reader(node.outputs[0])
    return node


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value
