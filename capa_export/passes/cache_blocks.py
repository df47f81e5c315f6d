"""Makes of decode the graph that engines run: one token behind a cache that is read once, and never copied.

The cache has a fixed room, in blocks; a step returns the new token's keys and values alone, and whoever runs it writes
them behind the rows that count.

B = batch, G = KV heads, N = blocks, W = rows of a block, d = head size.
"""

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, ShapeInferencePass

from capa_export.graph.contract import (
    CACHE_ROWS,
    PAST_LENGTHS,
    block_count,
    is_cache,
    is_past,
    is_present,
)
from capa_export.passes.behind_cache import heads_of, text_behind_cache
from capa_export.passes.stand_ins import replace_by_bodies

__all__ = ["CacheBlocksPass", "step_shapes"]

_STEP = "step"

_ATTENTION = """
Attention (query, past_key, past_value, key, value, past_lengths) => (y) {{
    {behind_cache}
    value_wide = Cast <to = 1> (value)
    weighted_BGrd = Mul (weight_BGr1, value_wide)
    mixed_BGrd = Add (past_mixed_BGrd, weighted_BGrd)
    narrow = CastLike (mixed_BGrd, query)
    heads = Constant <value_ints = [0, {heads}, 1, {head_size}]> ()
    y = Reshape (narrow, heads)
}}
"""


class CacheBlocksPass(ir.passes.InPlacePass):
    """Lets decode read caches [B, G, N, W, d] of which the first `past_lengths` rows count, and return one row of each.

    Scores, softmax and sums are in FP32. The batch is any, the step is one token.

    Requires that Attention reads what a past input was concatenated with, and a query that is scaled already. Ensures
    that nothing but attention reads a past input; a graph without one is left as it is.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        steps = {node: pasts for node in graph if (pasts := _pasts(node))}
        if not steps:
            return ir.passes.PassResult(model, modified=False)
        shapes = step_shapes(graph)
        # For the numbers of heads.
        ShapeInferencePass()(model)
        (lengths,) = (value for value in graph.inputs if value.name == PAST_LENGTHS)
        bodies = {node: _body(node, pasts[0]) for node, pasts in steps.items()}
        for node, pasts in steps.items():
            query = node.inputs[0]
            grown = [value.producer() for value in node.inputs[1:3] if value is not None]
            fresh = [concat.inputs[1] for concat in grown if concat is not None]
            node.resize_inputs(6)
            for index, value in enumerate((query, *pasts, *fresh, lengths)):
                node.replace_input_with(index, value)
            node.attributes.clear()
            for concat, value in zip(grown, fresh, strict=True):
                assert concat is not None and value is not None
                _return(graph, concat.outputs[0], value)
        for value in (*graph.inputs, *graph.outputs):
            # The step stays a name: TensorRT would not find that its positions are as many as its tokens.
            if is_cache(str(value.name)):
                value.shape = ir.Shape(shapes[str(value.name)])
        replace_by_bodies(model, bodies, graph.opset_imports[""])
        RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified=True)


def step_shapes(graph: ir.Graph) -> dict[str, tuple[int | str, ...]]:
    """Shapes of a graph's inputs and outputs, as an engine has them: with caches in blocks, if decode is given."""
    shapes: dict[str, tuple[int | str, ...]] = {
        str(value.name): tuple(str(size.value) if isinstance(size, ir.SymbolicDim) else size for size in value.shape)
        for value in (*graph.inputs, *graph.outputs)
        if value.shape is not None
    }
    if not any(_pasts(node) for node in graph):
        return shapes
    for name, shape in shapes.items():
        if is_past(name):
            batch, groups, length, head_size = shape
            shapes[name] = (batch, groups, block_count(str(length)), CACHE_ROWS, head_size)
        elif is_present(name):
            batch, groups, _, head_size = shape
            shapes[name] = (batch, groups, 1, head_size)
        else:
            shapes[name] = tuple(1 if size == _STEP else size for size in shape)
    return shapes


def _pasts(node: ir.Node) -> list[ir.Value]:
    """The past inputs that an Attention node reads with rows behind them."""
    if node.op_type != "Attention":
        return []
    grown = [value.producer() for value in node.inputs[1:3] if value is not None]
    joined = [concat.inputs[0] for concat in grown if concat is not None and concat.op_type == "Concat"]
    return [past for value in joined if value is not None and (past := _stored(value)).is_graph_input()]


def _stored(value: ir.Value) -> ir.Value:
    """What a part in FP32 has cast, or the value itself."""
    cast = value.producer()
    widened = cast.inputs[0] if cast is not None and cast.op_type == "Cast" else None
    return value if widened is None else widened


def _body(node: ir.Node, past_key: ir.Value) -> str:
    heads, _, head_size = heads_of(node)
    query, length = node.inputs[0], past_key.shape and past_key.shape[2]
    assert query is not None and isinstance(length, ir.SymbolicDim)
    same = query.dtype == past_key.dtype
    behind_cache = text_behind_cache(node, str(length.value), query="query", key="key", narrow=same)
    return _ATTENTION.format(behind_cache=behind_cache, heads=heads, head_size=head_size)


def _return(graph: ir.Graph, grown: ir.Value, fresh: ir.Value) -> None:
    """Let an output be the rows that a step adds, in place of all."""
    for cast in [node for node, _ in grown.uses() if node.op_type == "Cast"]:
        # A part in FP32 narrows them.
        cast.replace_input_with(0, fresh)
        return
    index = next(index for index, value in enumerate(graph.outputs) if value is grown)
    graph.outputs[index] = fresh
    name = grown.name
    grown.name = f"{name}.grown"
    fresh.name = name
