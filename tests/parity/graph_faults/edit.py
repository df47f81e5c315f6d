"""What changes a graph in place.

A value keeps its name: the one that is wrong is called as the healthy one was.
"""

from collections.abc import Callable, Iterator

import numpy as np
import onnx_ir as ir

__all__ = [
    "Make",
    "Tape",
    "gemm",
    "input_of",
    "later_layer",
    "limited",
    "mixed",
    "node_called",
    "nodes_of",
    "num_layers",
    "replace",
    "set_weight",
    "vision_block",
    "weight_of",
]


class Tape(ir.tape.Tape):
    """Nodes to insert, with constants."""

    def array(self, array: np.ndarray) -> ir.Value:
        return self.op("Constant", [], {"value": ir.tensor(array)})

    def ints(self, *numbers: int) -> ir.Value:
        return self.array(np.array(numbers, np.int64))


Make = Callable[[Tape, ir.Value], ir.Value]


def replace(graph: ir.Graph | ir.Function, value: ir.Value, make: Make, *, after: ir.Node | None = None) -> None:
    """Put what `make` makes of a value in its place and under its name; behind `after`, or behind its producer."""
    tape = Tape()
    new = make(tape, value)
    last = after or value.producer()
    if last is None:
        graph.insert_before(graph[0], tape.nodes)
    else:
        graph.insert_after(last, tape.nodes)
    new.type, new.shape = value.type, value.shape
    if not value.is_graph_input():
        new.name, value.name = value.name, f"{value.name}/healthy"
    for user, index in tuple(value.uses()):
        if user not in tape.nodes:
            user.replace_input_with(index, new)
    for index, output in enumerate(graph.outputs):
        if output is value:
            graph.outputs[index] = new


def input_of(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def nodes_of(model: ir.Model, op_type: str) -> Iterator[ir.Node]:
    return (node for node in model.graph if node.op_type == op_type)


def node_called(model: ir.Model, name: str) -> ir.Node:
    return next(node for node in model.graph if node.name == name)


def set_weight(model: ir.Model, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    value = model.graph.initializers[name]
    assert value.const_value is not None
    value.const_value = ir.tensor(np.ascontiguousarray(change(value.const_value.numpy().copy())), name=name)


def weight_of(model: ir.Model, name: str) -> np.ndarray:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


def limited(size: float, most: int) -> int:
    return int(min(size, most))


def mixed(array: np.ndarray, other: np.ndarray, size: float, axis: int = 0) -> np.ndarray:
    """The first `size` entries of an axis from `other`."""
    count = limited(size, array.shape[axis])
    first, rest = np.split(array, [count], axis)[1], np.split(other, [count], axis)[0]
    return np.concatenate([rest.astype(array.dtype), first], axis)


def num_layers(model: ir.Model) -> int:
    return sum(node.op_type == "Attention" for node in model.graph)


def later_layer(model: ir.Model) -> int:
    """A layer behind the first stage, with others behind it."""
    return num_layers(model) * 3 // 5


def vision_block(model: ir.Model) -> int:
    """The last vision block but one."""
    return num_layers(model) - 2


def gemm(model: ir.Model, name: str) -> tuple[str, str]:
    """Weight and node of a projection of the later layer."""
    layer = f"layers.{later_layer(model)}"
    return f"model.{layer}.{name}.weight", f"model/{layer}/{name.replace('.', '/')}/Gemm"
