"""Makes of decode the graph that engines run: one token behind a cache that is read once, and never copied.

The cache has a fixed room, in blocks; a step returns the new token's keys and values alone, and whoever runs it writes
them behind the rows that count. TensorRT copies keys and values that it is to concatenate, transpose, or multiply in a
number that it does not know to be a multiple of eight; what is written here, it reads where it lies.

B = batch, G = KV heads, N = blocks, W = rows of a block, C = N * W, r = query heads of a KV head, d = head size.
"""

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, ShapeInferencePass

from capa_export.graph.contract import (
    CACHE_ROWS,
    PAST_LENGTHS,
    block_count,
    cache_stages,
    is_cache,
    is_past,
    is_present,
)
from capa_export.passes.stand_ins import replace_by_bodies

__all__ = ["CacheBlocksPass", "step_shapes"]

_STEP = "step"

# The products of queries and keys are summed in FP32, elementwise: a matrix product would round them, or transpose the
# keys.
_ATTENTION = """
Attention (query, past_key, past_value, key, value, past_lengths) => (y) {{
    grouped = Constant <value_ints = [0, {groups}, 1, {repeats}, {head_size}]> ()
    query_BG1rd = Reshape (query, grouped)
    query_wide = Cast <to = 1> (query_BG1rd)
    rows = Constant <value_ints = [0, {groups}, -1, 1, {head_size}]> ()
    past_key_BGC1d = Reshape (past_key, rows)
    past_key_wide = Cast <to = 1> (past_key_BGC1d)
    last_axis = Constant <value_ints = [-1]> ()
    past_products = Mul (past_key_wide, query_wide)
    past_scores_BGCr = ReduceSum <keepdims = 0> (past_products, last_axis)
    repeat_axis = Constant <value_ints = [3]> ()
    key_BG11d = Unsqueeze (key, repeat_axis)
    key_wide = Cast <to = 1> (key_BG11d)
    products = Mul (key_wide, query_wide)
    scores_BG1r = ReduceSum <keepdims = 0> (products, last_axis)
    stage = Constant <value_ints = [{stage}]> ()
    lengths_1B = Gather <axis = 0> (past_lengths, stage)
    per_prompt = Constant <value_ints = [-1, 1, 1, 1]> ()
    lengths_B111 = Reshape (lengths_1B, per_prompt)
    num_blocks = Shape <start = 2, end = 3> (past_key)
    block = Constant <value_int = {block}> ()
    one = Constant <value_int = 1> ()
    zero = Constant <value_int = 0> ()
    num_rows = Mul (num_blocks, block)
    scalar_rows = Squeeze (num_rows)
    row_C = Range (zero, scalar_rows, one)
    inner = Constant <value_ints = [-1, 1]> ()
    row_C1 = Reshape (row_C, inner)
    counts_B1C1 = Less (row_C1, lengths_B111)
    lowest = Constant <value_float = -65504.0> ()
    none = Constant <value_float = 0.0> ()
    mask_B1C1 = Where (counts_B1C1, none, lowest)
    visible_BGCr = Add (past_scores_BGCr, mask_B1C1)
    both = Concat <axis = 2> (visible_BGCr, scores_BG1r)
    weights = Softmax <axis = 2> (both)
    row_axis = Constant <value_ints = [2]> ()
    first = Constant <value_ints = [0]> ()
    last = Constant <value_ints = [-1]> ()
    end = Constant <value_ints = [9223372036854775807]> ()
    past_weights_BGCr = Slice (weights, first, last, row_axis)
    weight_BG1r = Slice (weights, last, end, row_axis)
    {weigh}
    weight_BGr1 = Transpose <perm = [0, 1, 3, 2]> (weight_BG1r)
    value_wide = Cast <to = 1> (value)
    weighted_BGrd = Mul (weight_BGr1, value_wide)
    mixed_BGrd = Add (past_mixed_BGrd, weighted_BGrd)
    narrow = CastLike (mixed_BGrd, query)
    heads = Constant <value_ints = [0, {heads}, 1, {head_size}]> ()
    y = Reshape (narrow, heads)
}}
"""
# Block by block, so that many of a GPU's processors have a part of one head's rows.
_WEIGH_GROUPED = """
    past_weights_narrow = CastLike (past_weights_BGCr, query)
    blocks = Constant <value_ints = [0, {groups}, -1, {block}, {repeats}]> ()
    past_weights_BGNWr = Reshape (past_weights_narrow, blocks)
    past_weights_BGNrW = Transpose <perm = [0, 1, 2, 4, 3]> (past_weights_BGNWr)
    {widen}mixed_BGNrd = MatMul (past_weights_BGNrW, {past_value})
    mixed_wide = Cast <to = 1> (mixed_BGNrd)
    past_mixed_BGrd = ReduceSum <keepdims = 0> (mixed_wide, row_axis)
"""
# A product of one row would be made another kernel's, behind a copy of the values.
_WEIGH_SINGLE = """
    blocks = Constant <value_ints = [0, {groups}, -1, {block}, 1]> ()
    past_weights_BGNW1 = Reshape (past_weights_BGCr, blocks)
    past_value_wide = Cast <to = 1> (past_value)
    past_weighted = Mul (past_weights_BGNW1, past_value_wide)
    block_axes = Constant <value_ints = [2, 3]> ()
    past_mixed_BGd = ReduceSum <keepdims = 0> (past_weighted, block_axes)
    past_mixed_BGrd = Unsqueeze (past_mixed_BGd, row_axis)
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
    assert node.attributes.get_float("scale", 0.0) == 1.0
    assert past_key.shape is not None
    _, groups, length, head_size = past_key.shape
    query = node.inputs[0]
    assert query is not None and query.shape is not None
    heads = query.shape[1]
    assert isinstance(heads, int) and isinstance(groups, int) and isinstance(length, ir.SymbolicDim)
    repeats = heads // groups
    sizes: dict[str, object] = {
        "heads": heads,
        "groups": groups,
        "repeats": repeats,
        "head_size": head_size,
        "block": CACHE_ROWS,
        "stage": cache_stages(str(length.value)),
    }
    weigh = _WEIGH_GROUPED if repeats > 1 else _WEIGH_SINGLE
    # In a part in FP32 the cache is not.
    same = query.dtype == past_key.dtype
    sizes |= {
        "widen": "" if same else "past_value_wide = CastLike (past_value, query)\n    ",
        "past_value": "past_value" if same else "past_value_wide",
    }
    return _ATTENTION.format(weigh=weigh.format(**sizes), **sizes)


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
