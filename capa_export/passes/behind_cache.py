"""Attention of one token to the rows of a cache in blocks and to itself, in ONNX's text: a part of functions' bodies.

TensorRT copies keys and values that it is to concatenate, transpose, or multiply in a number that it does not know to
be a multiple of eight; what is written here, it reads where it lies.

B = batch, G = KV heads, N = blocks, W = rows of a block, C = N * W, r = query heads of a KV head, d = head size.
"""

import onnx_ir as ir

from capa_export.graph.contract import CACHE_ROWS, cache_stages

__all__ = ["heads_of", "text_behind_cache"]

# The products of queries and keys are summed in FP32, elementwise: a matrix product would round them, or transpose the
# keys.
_BEHIND_CACHE = """
    grouped = Constant <value_ints = [0, {groups}, 1, {repeats}, {head_size}]> ()
    query_BG1rd = Reshape ({query}, grouped)
    query_wide = Cast <to = 1> (query_BG1rd)
    rows = Constant <value_ints = [0, {groups}, -1, 1, {head_size}]> ()
    past_key_BGC1d = Reshape (past_key, rows)
    past_key_wide = Cast <to = 1> (past_key_BGC1d)
    last_axis = Constant <value_ints = [-1]> ()
    past_products = Mul (past_key_wide, query_wide)
    past_scores_BGCr = ReduceSum <keepdims = 0> (past_products, last_axis)
    repeat_axis = Constant <value_ints = [3]> ()
    key_BG11d = Unsqueeze ({key}, repeat_axis)
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


def text_behind_cache(node: ir.Node, length: str, *, query: str, key: str, narrow: bool) -> str:
    """Lines that let one token attend to a cache, whose first `past_lengths` rows count, and to itself.

    They read `past_key`, `past_value` [B, G, N, W, d] and `past_lengths` [1 + stages, B], and make, in FP32,
    `past_mixed_BGrd`, what the cache gives, and `weight_BGr1`, what the token's own value counts.

    Args:
        node: the Attention that they stand for, with shapes.
        length: the dimension of the cache, as decode or prefill names it.
        query: name of the scaled query [B, H, 1, d].
        key: name of the token's key [B, G, 1, d].
        narrow: whether the cache has the query's dtype; in a part in FP32 it has not.
    """
    heads, groups, head_size = heads_of(node)
    sizes: dict[str, object] = {
        "groups": groups,
        "repeats": heads // groups,
        "head_size": head_size,
        "block": CACHE_ROWS,
        "stage": cache_stages(length),
        "widen": "" if narrow else "past_value_wide = CastLike (past_value, query)\n    ",
        "past_value": "past_value" if narrow else "past_value_wide",
        "query": query,
        "key": key,
    }
    weigh = _WEIGH_GROUPED if heads > groups else _WEIGH_SINGLE
    return _BEHIND_CACHE.format(weigh=weigh.format(**sizes), **sizes)


def heads_of(node: ir.Node) -> tuple[int, int, int]:
    """Query heads, KV heads and head size of an Attention with shapes.

    Its scale is in the query already.
    """
    assert node.attributes.get_float("scale", 0.0) == 1.0
    query, key = node.inputs[0], node.inputs[1]
    assert query is not None and query.shape is not None and key is not None and key.shape is not None
    heads, groups, head_size = query.shape[1], key.shape[1], key.shape[3]
    assert isinstance(heads, int) and isinstance(groups, int) and isinstance(head_size, int)
    return heads, groups, head_size
