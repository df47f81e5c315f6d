"""CAPA without its values: the attention of the last prompt token, the mean over heads, at the same layer and k."""

from typing import TYPE_CHECKING

import onnx_ir as ir
from onnxscript import OpBuilder

from capa_export.graph.build import score_node
from capa_export.graph.functions import function
from capa_export.selectors import GraphView, Place, Prompted, Setting, Size, TensorView

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["GRADED", "LAYER", "LEAST", "OPTIONS", "PLACE", "READS", "flops", "reference", "score"]

PLACE: Place = "attention"
LAYER = None
GRADED = True
READS: tuple[Prompted, ...] = ()
LEAST = 1
OPTIONS: dict[str, Setting] = {}

_FUNCTION = function("""
AttentionScore <scale> (query, key) => (amounts) {
    query_1H1d = Cast <to = 1> (query)
    key_1GTd = Cast <to = 1> (key)
    one = Constant <value_ints = [1]> ()
    rest = Constant <value_ints = [-1]> ()
    kv_heads = Shape <start = 1, end = 2> (key)
    head_size = Shape <start = 3, end = 4> (key)
    grouped = Concat <axis = 0> (one, kv_heads, rest, head_size)
    query_1Grd = Reshape (query_1H1d, grouped)
    key_1GdT = Transpose <perm = [0, 1, 3, 2]> (key_1GTd)
    product_1GrT = MatMul (query_1Grd, key_1GdT)
    scale_factor = Constant <value_float: float = @scale> ()
    logits_1GrT = Mul (product_1GrT, scale_factor)
    attention_1GrT = Softmax <axis = -1> (logits_1GrT)
    heads = Constant <value_ints = [0, 1, 2]> ()
    amounts = ReduceMean <keepdims = 0> (attention_1GrT, heads)
}
""")


def score(op: OpBuilder, view: GraphView) -> ir.Value:
    """The mean over heads of softmax(q k)."""
    assert view.query is not None and view.key is not None
    return score_node(op, _FUNCTION, view.text_rows_X, view.query, view.key, scale=view.scale)


def reference(view: TensorView) -> "Tensor":
    """The mean over heads of the model's own probabilities."""
    assert view.attention is not None
    return view.attention.mean(0)


def flops(size: Size) -> int:
    """The last query's row of QK^T."""
    return 2 * size.tokens * size.dims.num_heads * size.dims.head_dim
