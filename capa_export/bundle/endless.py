"""Refuses graphs whose work is out of all proportion to what they hold: loops and functions as no build writes them."""

from collections import ChainMap
from collections.abc import Iterator, Mapping
from itertools import chain
from math import inf
from pathlib import Path
from typing import Any, TypeAlias

from google.protobuf.message import Message

from capa_export.base.errors import CapaError, first_line

__all__ = ["messages", "require_end"]

_DOMAINS = ("", "ai.onnx", "capa")
"""Domains of the operators that builds write; those of ONNX Runtime's own search through graphs are not among them."""
_SIZE = 1 << 24
"""The largest size of a dimension, and the largest number that is given to a graph as a size."""
_TRIPS = 1 << 26
"""Of a loop: as many as tokens, or tiles of a few."""
_NODES = 1 << 15
"""Of a graph with its functions in the places of their calls: those of 80 layers have some thousand."""
_DEPTH = 100
_ALIKE = ("Squeeze", "Unsqueeze", "Identity", "Reshape", "Gather", "Slice")
"""Operators that return numbers of their first input."""

Range: TypeAlias = "tuple[float, float]"
"""Bounds of the numbers in a tensor, both among them."""
Scope: TypeAlias = "ChainMap[str, Any]"
"""By the name of a value the node that makes it, its tensor, or None where it is given to the graph."""
_ANYTHING: Range = (-inf, inf)


def messages(message: Message, name: str) -> Iterator[Any]:
    """Yield every message of a type in a message, however deeply nested."""
    if message.DESCRIPTOR.name == name:
        yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in [value] if isinstance(value, Message) else value:
                yield from messages(part, name)


def require_end(path: Path, model: Any) -> None:
    """Hold a graph to what builds write: functions that call no end of others, and loops that follow sizes.

    Args:
        path: of the graph, for people.
        model: an `onnx.ModelProto`.

    Raises:
        CapaError: a node is one that no build writes.
    """
    nodes = list(messages(model, "NodeProto"))
    for node in nodes:
        if node.domain not in _DOMAINS or node.op_type == "Scan":
            raise _refusal(path, node, "no build writes")
    functions = {_key(function): function for function in model.functions}
    if _expanded(path, model.graph, functions, {}, ()) > _NODES:
        raise CapaError(f"{path}: its functions come to more than {_NODES} nodes; build the bundle again")
    if any(node.op_type == "Loop" for node in nodes):
        from onnx import inliner

        try:
            graph = inliner.inline_local_functions(model).graph
        except Exception as error:
            raise CapaError(f"{path}: cannot be read as ONNX ({first_line(error)}); build the bundle again") from error
        _check_loops(path, graph, ChainMap())


def _refusal(path: Path, node: Any, why: str) -> CapaError:
    return CapaError(
        f"{path}: node {node.name!r:.80} is a {node.op_type:.80} of domain {node.domain!r:.80} that {why}, and might "
        "never end; build the bundle again"
    )


def _key(function: Any) -> tuple[str, str, str]:
    return function.domain, function.name, function.overload


def _expanded(
    path: Path, graph: Any, functions: Mapping[Any, Any], known: dict[Any, int], within: tuple[Any, ...]
) -> int:
    """How many nodes a graph or a function has with all that it calls."""
    total = 0
    for node in chain.from_iterable(messages(one, "NodeProto") for one in graph.node):
        key = node.domain, node.op_type, node.overload
        if key in within or len(within) > _DEPTH:
            raise _refusal(path, node, "calls itself")
        if key in functions and key not in known:
            known[key] = _expanded(path, functions[key], functions, known, (*within, key))
        total += known.get(key, 1)
    return total


def _check_loops(path: Path, graph: Any, outer: Scope) -> None:
    made = {name: node for node in graph.node for name in node.output}
    given = dict.fromkeys(value.name for value in graph.input)
    scope = outer.new_child({**given, **{tensor.name: tensor for tensor in graph.initializer}, **made})
    for node in graph.node:
        inner = [attribute.g for attribute in node.attribute if attribute.HasField("g")]
        if node.op_type != "Loop":
            for branch in inner:
                _check_loops(path, branch, scope)
        elif any(one.op_type == "Loop" for body in inner for one in messages(body, "NodeProto")):
            raise _refusal(path, node, "has others in it")
        elif not node.input or _bounds(node.input[0], scope, {}, _DEPTH)[1] > _TRIPS:
            raise _refusal(path, node, "counts further than any size")


def _bounds(name: str, scope: Scope, known: dict[str, Range], depth: int) -> Range:
    """Bounds of a value that follow from sizes, from what is given to the graph, and from small constants."""
    if name not in known:
        known[name] = _bounds_of(scope[name], scope, known, depth) if name in scope and depth else _ANYTHING
    return known[name]


def _bounds_of(made: Any, scope: Scope, known: dict[str, Range], depth: int) -> Range:
    if made is None:
        return 0, _SIZE
    if made.DESCRIPTOR.name == "TensorProto":
        return _bounds_of_tensor(made)
    if made.domain not in ("", "ai.onnx"):
        return _ANYTHING
    if made.op_type == "Constant":
        return _bounds_of_constant(made)
    if made.op_type == "Shape":
        return 0, _SIZE
    inputs = [_bounds(name, scope, known, depth - 1) for name in made.input if name]
    least, most = ([bounds[end] for bounds in inputs] for end in (0, 1))
    match made.op_type, len(inputs):
        case operator, count if operator in _ALIKE and count:
            return inputs[0]
        case "Concat", count if count:
            return min(least), max(most)
        case "Max", count if count:
            return max(least), max(most)
        case "Min", count if count:
            return min(least), min(most)
        case "Add", 2:
            return sum(least), sum(most)
        case "Sub", 2:
            return least[0] - most[1], most[0] - least[1]
        case "Div", 2:
            # Of whole numbers, by none that is smaller than one.
            largest = max(abs(least[0]), abs(most[0]))
            return -largest, largest
        case _:
            return _ANYTHING


def _bounds_of_constant(node: Any) -> Range:
    for attribute in node.attribute:
        if attribute.name == "value":
            return _bounds_of_tensor(attribute.t)
        if attribute.name == "value_int":
            return attribute.i, attribute.i
        if attribute.name == "value_ints" and attribute.ints:
            return min(attribute.ints), max(attribute.ints)
    return _ANYTHING


def _bounds_of_tensor(tensor: Any) -> Range:
    from onnx import TensorProto, numpy_helper

    whole = tensor.data_type in (TensorProto.INT64, TensorProto.INT32)
    if not whole or tensor.data_location == TensorProto.EXTERNAL or list(tensor.dims) not in ([], [1]):
        return _ANYTHING
    try:
        (number,) = numpy_helper.to_array(tensor).reshape(-1).tolist()
    except (ValueError, TypeError):
        return _ANYTHING
    return number, number
