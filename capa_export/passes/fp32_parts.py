"""Puts parts of a graph in FP32, where half precision would overflow; what surrounds them keeps its dtype."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import onnx_ir as ir

from capa_export.config.parts import Branch, Unit, address_of
from capa_export.graph.functions import DOMAIN

__all__ = ["FP32PartsPass", "unit_of"]

_STREAM = ("Add", "Gather", "Reshape", "Slice", "Squeeze", "TokenGather", "Transpose", "VisualScale")
"""Operators whose first output is the residual stream if one of their inputs is."""

_CHOOSE = ("TopKKeep", "TokenGather", "KeepText")
"""Nodes of a stage that are no score."""


class FP32PartsPass(ir.passes.InPlacePass):
    """Puts the units that are this graph's in FP32.

    Weights that only they read become FP32 and are then bound as such. CAPA nodes among them stay what they are: the
    plugins take FP32 too.

    Requires a graph in half precision, without its weights and named as `build_model` names it. Ensures that inputs and
    outputs of the graph keep their dtypes.

    Args:
        units: of the model; those of the decoder do nothing to a vision tower, and the other way round.
    """

    def __init__(self, units: Sequence[Unit]) -> None:
        super().__init__()
        self.units = units

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        dtype = graph.inputs[0].dtype
        assert dtype is not None
        members = _members(graph, [unit for unit in self.units if unit.tower == (graph.name == "visual")])
        leaving = {value for node in members for value in node.outputs if value.dtype == dtype}
        for value in leaving:
            value.dtype = ir.DataType.FLOAT
        casts: dict[ir.Value, ir.Value] = {}
        changed = bool(leaving)
        for node in list(graph):
            for index, value in enumerate(node.inputs):
                if value is None:
                    continue
                if node in members and value.dtype == dtype:
                    if _is_weight(value) and all(use.node in members for use in value.uses()):
                        value.type = ir.TensorType(ir.DataType.FLOAT)
                    else:
                        node.replace_input_with(index, _cast(graph, value, ir.DataType.FLOAT, casts))
                    changed = True
                elif node not in members and value in leaving:
                    node.replace_input_with(index, _cast(graph, value, dtype, casts))
        for index, value in enumerate(graph.outputs):
            if value in leaving:
                producer, cast = value.producer(), _cast(graph, value, dtype, casts)
                assert producer is not None
                cast.name, value.name = value.name, f"{producer.name}/output_{value.index()}"
                graph.outputs[index] = cast
        return ir.passes.PassResult(model, modified=changed)


def unit_of(node: ir.Node) -> Unit | None:
    """The unit to put in FP32 for the sake of a node of a graph without FP32 parts; None where there is none."""
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    tower = graph.name == "visual"
    if address := address_of(node.name or ""):
        branch = dict(_branches(_blocks(graph)[address.index]))[node]
        # What a stage makes of a score is as good as the score.
        if branch is None and address.path.startswith("prune") and node.op_type != "TokenGather":
            branch = "attention"
        if branch is not None:
            return Unit(tower, address.index, branch)
    return Unit(tower) if node.op_type in _STREAM else None


def _is_weight(value: ir.Value) -> bool:
    return value.is_initializer() and value.const_value is None


def _cast(graph: ir.Graph, value: ir.Value, dtype: ir.DataType, made: dict[ir.Value, ir.Value]) -> ir.Value:
    """The value in another dtype, cast once, right behind where it is made."""
    if value not in made:
        producer = value.producer()
        scope = "widened" if dtype == ir.DataType.FLOAT else "narrowed"
        name = f"{value.name if producer is None else producer.name}/{scope}/Cast"
        if index := value.index():
            name += f"_{index + 1}"
        made[value] = ir.Value(name=f"{name}/output_0", type=ir.TensorType(dtype), shape=value.shape)
        node = ir.node("Cast", [value], {"to": dtype}, name=name, outputs=[made[value]])
        if producer is None:
            graph.insert_before(graph[0], node)
        else:
            graph.insert_after(producer, node)
    return made[value]


def _members(graph: ir.Graph, units: Sequence[Unit]) -> set[ir.Node]:
    """The nodes of the units."""
    blocks = _blocks(graph)
    members: set[ir.Node] = set()
    for unit in units:
        if unit.index is None:
            members |= _residual(blocks[0])
        else:
            members |= {node for node, branch in _branches(blocks[unit.index]) if unit.branch in (None, branch)}
    # A cast is where an island ends.
    return {node for node in members if node.op_type != "Cast"}


def _blocks(graph: ir.Graph) -> Mapping[int, Sequence[tuple[ir.Node, str]]]:
    """The nodes of each layer, with their names in it."""
    blocks: defaultdict[int, list[tuple[ir.Node, str]]] = defaultdict(list)
    for node in graph:
        if address := address_of(node.name or ""):
            blocks[address.index].append((node, address.path))
    return blocks


def _branches(block: Sequence[tuple[ir.Node, str]]) -> Iterator[tuple[ir.Node, Branch | None]]:
    """The nodes of a layer, each with the branch it is of; None for what joins them and for the tokens' way.

    A layer adds its attention to the stream before its FFN begins.
    """
    branch: Branch = "attention"
    for node, path in block:
        if "/" not in path and node.op_type == "Add" and node.outputs[0].dtype != ir.DataType.INT64:
            branch = "mlp"
            yield node, None
        elif path.startswith("prune"):
            # A score may read the output projection, whose weights are to have one dtype.
            scores = node.op_type == "Slice" or (node.domain == DOMAIN and node.op_type not in _CHOOSE)
            yield node, "attention" if scores else None
        else:
            yield node, None if path in ("Gather", "VisualScale") else branch


def _residual(first_block: Sequence[tuple[ir.Node, str]]) -> set[ir.Node]:
    """All that reads the stream that enters the first block, or what becomes of it."""
    norm = next(node for node, path in first_block if node.op_type.endswith("Normalization") and path.count("/") == 1)
    readers: set[ir.Node] = set()
    stream = [norm.inputs[0]]
    while stream:
        value = stream.pop()
        assert value is not None
        for node in {use.node for use in value.uses()} - readers:
            readers.add(node)
            if node.op_type in _STREAM:
                stream.append(node.outputs[0])
    return readers
