"""A graph whose attention runs over tiles of queries: ONNX Runtime's CPU provider holds all weights of a call at once.

B = batch, H = query heads, G = KV heads, N = queries, L = keys, d = head size. Shipped graphs keep their one Attention
node, for which TensorRT has fused kernels; this is for sessions on a CPU alone.
"""

import onnx
import onnx_ir as ir

from capa_export.graph.opset import OPSET
from capa_export.passes.attention_bytes import is_unmasked_attention

__all__ = ["TileAttentionPass"]

_DOMAIN = "capa.cpu"
_TILE = 1 << 22
"""Attention weights of a tile: 16 MB in FP32 stay in a CPU's caches, which takes a quarter of the time of one call."""

_WHOLE = "mixed_BHtd = Attention <scale: float = @scale> (query_BHtd, key, value)"
_CAUSAL = """
    seen_BGsd = Slice (key, zero, end, length_axis)
    value_BGsd = Slice (value, zero, end, length_axis)
    num_seen = Shape <start = 2, end = 3> (seen_BGsd)
    scalar_seen = Squeeze (num_seen)
    scalar_start = Squeeze (start)
    scalar_end = Squeeze (end)
    scalar_zero = Constant <value_int = 0> ()
    scalar_one = Constant <value_int = 1> ()
    column_s = Range (scalar_zero, scalar_seen, scalar_one)
    row_t = Range (scalar_start, scalar_end, scalar_one)
    row_t1 = Unsqueeze (row_t, one)
    visible_ts = LessOrEqual (column_s, row_t1)
    mixed_BHtd = Attention <scale: float = @scale> (query_BHtd, seen_BGsd, value_BGsd, visible_ts)
"""
_FUNCTION = """
<opset_import: ["": {opset}], domain: "{domain}">
{name} <scale> (query, key, value) => (mixed) {{
    one = Constant <value_ints = [1]> ()
    zero = Constant <value_ints = [0]> ()
    length_axis = Constant <value_ints = [2]> ()
    batch_heads = Shape <start = 0, end = 2> (query)
    num_rows = ReduceProd (batch_heads)
    num_queries = Shape <start = 2, end = 3> (query)
    num_keys = Shape <start = 2, end = 3> (key)
    per_query = Mul (num_rows, num_keys)
    budget = Constant <value_ints = [{tile}]> ()
    fitting = Div (budget, per_query)
    at_least_one = Max (fitting, one)
    tile = Min (at_least_one, num_queries)
    below_tile = Sub (tile, one)
    rounded = Add (num_queries, below_tile)
    count = Div (rounded, tile)
    padded = Mul (count, tile)
    missing = Sub (padded, num_queries)
    leading = Constant <value_ints = [0, 0, 0, 0, 0, 0]> ()
    pads = Concat <axis = 0> (leading, missing, zero)
    query_BHPd = Pad (query, pads)
    trips = Squeeze (count)
    always = Constant <value = bool {{1}}> ()
    tiles_CBHtd = Loop (trips, always) <body = tile_body (int64 step, bool go) => (
        bool go_on, {dtype}[batch, heads, rows, size] mixed_BHtd
    ) {{
        go_on = Identity (go)
        step_1 = Unsqueeze (step, zero)
        start = Mul (step_1, tile)
        end = Add (start, tile)
        query_BHtd = Slice (query_BHPd, start, end, length_axis)
        {attention}
    }}>
    tiles_BHCtd = Transpose <perm = [1, 2, 0, 3, 4]> (tiles_CBHtd)
    value_size = Shape <start = 4, end = 5> (tiles_BHCtd)
    shape = Concat <axis = 0> (batch_heads, padded, value_size)
    mixed_BHPd = Reshape (tiles_BHCtd, shape)
    mixed = Slice (mixed_BHPd, zero, num_queries, length_axis)
}}
"""


class TileAttentionPass(ir.passes.InPlacePass):
    """Runs every unmasked Attention node over tiles of its queries; the weights stay where they are.

    Requires that attention has the attributes that our graphs give it, and typed queries. Ensures that no unmasked
    Attention node is left in the graph itself; functions stay as they are.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        nodes = [node for node in model.graph if node.domain == "" and is_unmasked_attention(node.op_type, node.inputs)]
        for node in nodes:
            query = node.inputs[0]
            assert query is not None and query.dtype is not None
            function = _function(query.dtype, causal=bool(node.attributes["is_causal"].as_int()))
            model.functions[function.identifier()] = function
            node.domain, node.op_type = function.domain, function.name
            del node.attributes["is_causal"]
        if nodes:
            model.graph.opset_imports[_DOMAIN] = 1
        return ir.passes.PassResult(model, modified=bool(nodes))


def _function(dtype: ir.DataType, *, causal: bool) -> ir.Function:
    text = _FUNCTION.format(
        # An FP32 island has one of its own.
        name=f"Tiled{'Causal' if causal else ''}Attention_{dtype.name}",
        opset=OPSET,
        domain=_DOMAIN,
        tile=_TILE,
        dtype=dtype.name.lower(),
        attention=_CAUSAL if causal else _WHOLE,
    )
    return ir.serde.deserialize_function(onnx.parser.parse_function(text))
