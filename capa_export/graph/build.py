"""From a traced function to a named, reproducible ONNX model."""

from ast import literal_eval
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript import GraphBuilder, OpBuilder

import capa_export
from capa_export.graph.functions import DOMAIN, FUNCTIONS, KEEP_TEXT, PLUGIN, parse_function
from capa_export.graph.opset import IR_VERSION, OPSET
from capa_export.selectors.selector import Function

__all__ = ["END", "Input", "Output", "SelectorNodes", "build_model", "call"]

END = 2**31 - 1
"""A slice end past any length."""

Output = tuple[str, ir.Value, tuple[int | str, ...]]
"""Name, value and shape of a graph output."""


_OUTPUT_DTYPES = {"ContributionScore": ir.DataType.FLOAT, "TopKKeep": ir.DataType.INT64}
"""Where outputs do not have the dtypes of the inputs in their places."""
_FEW = 20
"""Numbers of a constant up to which onnxscript tells shape inference what they are."""
_MOST_KINDS = 10_000
"""Kinds of nodes that are remembered at once; a model has some two hundred."""
_inferred: dict[object, list[tuple[ir.DataType, ir.Shape]]] = {}
"""Kind of a node -> dtypes and shapes of its outputs, for all graphs of this process."""
_SHAPE_INPUTS: dict[str, dict[str, Any]] = {"TopKKeep": {"tensorrt_plugin_shape_input_indices": [1]}}
"""Inputs whose values are sizes, which TensorRT then reads on the host."""


@dataclass(frozen=True, slots=True)
class Input:
    """A graph input; a string in the shape names a dimension that is known at run time only."""

    name: str
    dtype: ir.DataType
    shape: tuple[int | str, ...]


def call(op: OpBuilder, name: str, *inputs: ir.Value, **attributes: Any) -> tuple[ir.Value, ...]:
    """Add a node of domain `capa` whose body is one of `FUNCTIONS`; shape inference does not look into bodies.

    The plugin attributes make TensorRT take a plugin where one is registered, and the body everywhere else.
    """
    values = op.call(FUNCTIONS[name], *inputs, **attributes, **PLUGIN, **_SHAPE_INPUTS.get(name, {}))
    outputs = (values,) if isinstance(values, ir.Value) else tuple(values)
    for index, output in enumerate(outputs):
        dtype = _OUTPUT_DTYPES.get(name, inputs[index].dtype)
        assert dtype is not None
        output.dtype = dtype
    return outputs


class SelectorNodes:
    """Adds a selector's nodes, as `selectors.selector.NodeWriter` describes.

    Args:
        op: onnxscript's builder of the graph.
    """

    def __init__(self, op: OpBuilder) -> None:
        self._op = op

    def __getattr__(self, operator: str) -> Callable[..., ir.Value]:
        return getattr(self._op, operator)

    def capa(self, name: str, *inputs: ir.Value, **attributes: Any) -> tuple[ir.Value, ...]:
        """Add an operator that has kernels."""
        return call(self._op, name, *inputs, **attributes)

    def apply(self, function: Function, *inputs: ir.Value, **attributes: Any) -> tuple[ir.Value, ...]:
        """Add a function that has no plugin."""
        outputs = self._op.call(parse_function(function.text), *inputs, **attributes)
        return (outputs,) if isinstance(outputs, ir.Value) else tuple(outputs)

    def scores(self, function: Function, text_rows_X: ir.Value, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        """Add a function that gives each token an amount, and keep text above all of them."""
        (amounts,) = self.apply(function, *inputs, **attributes)
        amounts.dtype = ir.DataType.FLOAT
        scores = self._op.call(KEEP_TEXT, amounts, text_rows_X)
        assert isinstance(scores, ir.Value)
        scores.dtype = ir.DataType.FLOAT
        return scores


class _Builder(GraphBuilder):
    """A graph builder that looks at schemas and infers shapes once for all nodes that are alike, as layers are."""

    def _partition_inputs_attributes(
        self, schema: onnx.defs.OpSchema | None, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> tuple[Sequence[Any], dict[str, Any]]:
        if schema is None:
            return args, kwargs
        names, required = _attributes(schema.domain, schema.name, schema.since_version)
        plain = schema.min_input <= len(args) <= schema.max_input and required <= kwargs.keys() <= names.keys()
        if not plain:
            return super()._partition_inputs_attributes(schema, args, kwargs)
        return args, {name: kwargs[name] for name in names if name in kwargs}

    def _infer_shapes(self, node: ir.Node) -> None:
        kind = _kind(node)
        known = _inferred.get(kind) if all(output.type is None for output in node.outputs) else None
        if known is None:
            super()._infer_shapes(node)
            found = [(output.dtype, output.shape) for output in node.outputs if isinstance(output.type, ir.TensorType)]
            known = [(dtype, shape.copy()) for dtype, shape in found if dtype is not None and shape is not None]
            if len(known) == len(node.outputs):
                if len(_inferred) >= _MOST_KINDS:
                    _inferred.clear()
                _inferred[kind] = known
            return
        for output, (dtype, shape) in zip(node.outputs, known, strict=True):
            # Both may be changed later.
            output.type, output.shape = ir.TensorType(dtype), shape.copy()


def _kind(node: ir.Node) -> object:
    """All that the shapes of a node's outputs depend on: equal for nodes that are alike."""
    inputs = [
        value
        and (
            type(value.type),
            value.dtype,
            None if value.shape is None else tuple(value.shape),
            # Only of few numbers do shapes depend, such as a Reshape's.
            None if (const := value.const_value) is None or const.size > _FEW else const.numpy().tobytes(),
        )
        for value in node.inputs
    ]
    attributes = [(name, attribute.type, _told(attribute)) for name, attribute in node.attributes.items()]
    return node.op_identifier(), node.version, tuple(attributes), tuple(inputs), len(node.outputs)


def _told(attribute: ir.Attr) -> object:
    """What an attribute tells shape inference: of a tensor, its dtype and shape."""
    if attribute.type != ir.AttributeType.TENSOR:
        return attribute.value
    tensor = attribute.as_tensor()
    return tensor.dtype, tuple(tensor.shape)


@cache
def _attributes(domain: str, operator: str, version: int) -> tuple[dict[str, None], set[str]]:
    """The names of an operator's attributes in their order, and those that every node must have."""
    known = onnx.defs.get_schema(operator, version, domain).attributes.values()
    return dict.fromkeys(entry.name for entry in known), {entry.name for entry in known if entry.required}


def build_model(
    name: str, inputs: Sequence[Input], trace: Callable[[OpBuilder, dict[str, ir.Value]], list[Output]]
) -> ir.Model:
    """Trace a graph and give every node and value a stable, layer-addressable name."""
    graph = ir.Graph([], [], nodes=[], name=name, opset_imports={"": OPSET, DOMAIN: 1})
    builder = _Builder(graph)
    values = {entry.name: builder.input(entry.name, entry.dtype, entry.shape) for entry in inputs}
    outputs = trace(builder.op, dict(values))
    graph.outputs.extend(value for _, value, _ in outputs)
    model = ir.Model(
        graph,
        ir_version=IR_VERSION,
        producer_name="capa-export",
        producer_version=capa_export.__version__,
        functions=[builder.functions[key] for key in sorted(builder.functions)],
    )
    # A selector is shown more than it reads.
    RemoveUnusedNodesPass()(model)
    _name_nodes(graph)
    for output, value, shape in outputs:
        value.name, value.shape = output, ir.Shape(shape)
    return model


def _name_nodes(graph: ir.Graph) -> None:
    """`model/layers.3/self_attn/q_proj/Gemm`: names count within their module, so an edit elsewhere moves none."""
    seen: Counter[str] = Counter()
    for node in graph:
        scope = [part for part in literal_eval(node.metadata_props["pkg.onnxscript.name_scopes"]) if part]
        path = "/".join([*scope, node.op_type])
        seen[path] += 1
        node.name = path if seen[path] == 1 else f"{path}_{seen[path]}"
        node.metadata_props.clear()
        for index, output in enumerate(node.outputs):
            output.name = f"{node.name}/output_{index}"
