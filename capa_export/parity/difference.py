"""Describes how a node differs from its reference node: operator, attributes, function body, wiring, numbers."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

from capa_export.parity.graph_groups import GraphGroups
from capa_export.passes.widen_bf16 import tensor_values

__all__ = ["node_difference"]

_CHUNK = 1 << 24
"""Numbers compared at a time."""
_SMALL = 1 << 26
"""Numbers up to which a matrix is searched for a pattern."""


def node_difference(node: ir.Node, own: GraphGroups, reference: GraphGroups) -> str:
    """The first difference in `own`, as a clause; empty where only the precision differs.

    Args:
        node: a node of the reference graph.
        own: the graph to blame.
        reference: the same graph as it should be.
    """
    return next(_differences(node, own, reference), "")


def _differences(node: ir.Node, own: GraphGroups, reference: GraphGroups) -> Iterator[str]:
    name = str(node.name)
    other = own.nodes.get(name)
    for index, made in enumerate(node.outputs):
        named = own.named(str(made.name))
        if named is not None and (other is None or _before_casts(named, reference) is not other.outputs[index]):
            yield f"its output {made.name} comes from {_origin(named, reference)}"
    if other is None or name not in own.live:
        yield f"it takes no part in the graph's outputs{'' if other else ', the graph has no such node'}"
        return
    if other.op_identifier() != node.op_identifier():
        yield f"it is {other.op_type}, not {node.op_type}"
        return
    for key in sorted({*node.attributes, *other.attributes}):
        # Where a plugin stands in is the device's matter, and the dtype of a cast is the precision's.
        if "plugin" not in key and (node.op_type, key) != ("Cast", "to"):
            mine, wanted = (_attribute(one.attributes.get(key)) for one in (other, node))
            if not np.array_equal(mine, wanted):
                yield f"{key} is {_shown(mine)}, not {_shown(wanted)}"
    if node.op_identifier() in reference.model.functions and _body(other, own) != _body(node, reference):
        yield f"the body of the function {node.op_type} was changed"
    if len(other.inputs) != len(node.inputs):
        yield f"it has {len(other.inputs)} inputs, not {len(node.inputs)}"
    for index, wanted in enumerate(node.inputs):
        mine = other.inputs[index] if index < len(other.inputs) else None
        yield from _input_differences(mine, wanted, reference)


def _input_differences(mine: ir.Value | None, wanted: ir.Value | None, reference: GraphGroups) -> Iterator[str]:
    if mine is None or wanted is None:
        if wanted is not None:
            yield f"input {wanted.name} is missing"
        elif mine is not None:
            yield f"input {_origin(mine, reference)} is too many"
        return
    tensors = _tensor(_before_casts(mine, reference)), _tensor(wanted)
    if tensors[0] is not None and tensors[1] is not None:
        if problem := _numbers(tensors[0], tensors[1], str(wanted.name), reference):
            yield f"{str(mine.name) if wanted.is_initializer() else 'its constant'} {problem}"
    elif _source(_before_casts(mine, reference)) != _source(wanted):
        yield f"it reads {_origin(mine, reference)}, not {wanted.name}"


def _attribute(attribute: ir.Attr | None) -> Any:
    if attribute is None:
        return None
    return attribute.as_tensor().numpy() if attribute.type == ir.AttributeType.TENSOR else attribute.value


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else "left out" if value is None else str(value)


def _body(node: ir.Node, cut: GraphGroups) -> list[bytes]:
    function = cut.model.functions.get(node.op_identifier())
    return [] if function is None else [one.SerializeToString() for one in ir.to_proto(function).node]


def _before_casts(value: ir.Value, reference: GraphGroups) -> ir.Value:
    """Follow a value back through casts that only this graph has, where its precision changes."""
    producer = value.producer()
    while producer is not None and producer.op_type == "Cast" and str(producer.name) not in reference.nodes:
        source = producer.inputs[0]
        assert source is not None
        value, producer = source, source.producer()
    return value


def _source(value: ir.Value) -> tuple[str | None, int | None]:
    producer = value.producer()
    return (value.name if producer is None else producer.name), value.index()


def _origin(value: ir.Value, reference: GraphGroups) -> str:
    """Name of a value; where only this graph has the node that makes it, its operator and inputs."""
    value = _before_casts(value, reference)
    producer = value.producer()
    if producer is None or str(producer.name) in reference.nodes:
        return str(value.name)
    return f"{producer.op_type} of {', '.join(str(one.name) for one in producer.inputs if one is not None)}"


def _tensor(value: ir.Value) -> ir.TensorProtocol | None:
    producer = value.producer()
    if producer is None or producer.op_type != "Constant":
        return value.const_value
    attribute = next(iter(producer.attributes.values()))
    return attribute.as_tensor() if attribute.type == ir.AttributeType.TENSOR else ir.tensor(np.array(attribute.value))


def _numbers(mine: ir.TensorProtocol, wanted: ir.TensorProtocol, name: str, reference: GraphGroups) -> str:
    """How the numbers differ from the reference's, rounded to their precision; empty where they do not."""
    shapes = [tuple(tensor.shape.numpy()) for tensor in (mine, wanted)]
    if shapes[0] != shapes[1]:
        return f"has shape {list(shapes[0])}, not {list(shapes[1])}"
    own, right = (np.reshape(tensor_values(tensor), -1) for tensor in (mine, wanted))
    differ, worst = 0, 0.0
    for start in range(0, own.size, _CHUNK):
        part = own[start : start + _CHUNK]
        with np.errstate(over="ignore"):
            expected = right[start : start + _CHUNK].astype(part.dtype)
        wrong = ~((part == expected) | ((part != part) & (expected != expected)))  # noqa: PLR0124 - NaN, in any dtype.
        differ += int(wrong.sum())
        if wrong.any() and np.issubdtype(right.dtype, np.floating):
            change = np.abs(part[wrong].astype(np.float64) - expected[wrong].astype(np.float64))
            worst = float(
                np.maximum(worst, (change / np.maximum(np.abs(expected[wrong].astype(np.float64)), 1e-30)).max())
            )
    if not differ:
        return ""
    pattern = _pattern(own.reshape(shapes[0]), right.reshape(shapes[0]), name, reference) if own.size <= _SMALL else ""
    size = f", by up to {worst:.2g} times what they should be" if worst and np.isfinite(worst) else ""
    return f"differs in {differ:,} of {own.size:,} numbers{pattern or size}"


def _pattern(own: np.ndarray, right: np.ndarray, name: str, reference: GraphGroups) -> str:
    """A pattern that explains a wrong array, such as a transposition; empty where none is seen."""
    right = right.astype(own.dtype)
    if not np.isfinite(own.astype(np.float32)).all():
        return " (some are not finite)"
    for constant, what in ((0, "zero"), (1, "one")):
        if (own == constant).all():
            return f" (all are {what})"
    for other, value in reference.model.graph.initializers.items():
        same_kind = _without_layer(other) == _without_layer(name) and other != name
        if same_kind and value.const_value is not None and np.array_equal(own, _cast(value.const_value, own)):
            return f" (they are those of {other})"
    if own.ndim == 2:
        if own.shape[0] == own.shape[1] and np.array_equal(own, right.T):
            return " (it is transposed)"
        for axis, what in ((0, "rows"), (1, "columns")):
            if np.array_equal(np.sort(own, axis), np.sort(right, axis)):
                return f" (its {what} change places)"
    return ""


def _cast(tensor: ir.TensorProtocol, like: np.ndarray) -> np.ndarray:
    return tensor_values(tensor).astype(like.dtype)


def _without_layer(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
