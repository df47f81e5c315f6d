"""Puts the bodies of functions in the places of nodes, under the names of what they stand for."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

__all__ = ["replace_by_bodies"]

_DOMAIN = "capa.stand_in"
_SCOPE = "capa.scope"


def replace_by_bodies(model: ir.Model, bodies: Mapping[ir.Node, str], opset: int) -> None:
    """Replace nodes; what stands for one has its name as a scope, and its outputs keep their names.

    Args:
        model: that the nodes are in.
        bodies: of each node, a function in ONNX's text, whose inputs are the node's.
        opset: of ONNX's own operators in the bodies.
    """
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    given = [{output.name for node in graph for output in node.outputs} for graph in graphs]
    header = f'<opset_import: ["": {opset}], domain: "{_DOMAIN}">'
    for node, body in bodies.items():
        function = ir.serde.deserialize_function(onnx.parser.parse_function(header + body))
        # A function of its own for every node, so that no two are taken for the same.
        function.overload = str(len(model.functions))
        model.functions[function.identifier()] = function
        node.domain, node.op_type, node.overload = function.domain, function.name, function.overload
        node.metadata_props[_SCOPE] = node.name or node.op_type
    InlinePass(lambda function: function.domain == _DOMAIN)(model)
    for graph, names in zip(graphs, given, strict=True):
        _name(graph, names)


def _name(nodes: Iterable[ir.Node], kept: Collection[str | None]) -> None:
    """`model/norm/RMSNormalization/Sqrt`: what stands for a node is named as if that were a module."""
    seen: Counter[str] = Counter()
    for node in nodes:
        scope = node.metadata_props.pop(_SCOPE, None)
        if scope is None:
            continue
        path = f"{scope}/{node.op_type}"
        seen[path] += 1
        node.name = path if seen[path] == 1 else f"{path}_{seen[path]}"
        for index, output in enumerate(node.outputs):
            if output.name not in kept:
                output.name = f"{node.name}/output_{index}"
