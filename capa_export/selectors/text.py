"""Functions that selectors share. T = tokens, X = text tokens, D = width of a row; ranks are whole numbers in FP32."""

from typing import TYPE_CHECKING

from capa_export.selectors.selector import Function, GraphView, NodeWriter

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = [
    "DESCENDING_RANK",
    "LAST_LOGITS",
    "RANK_SCORES",
    "TOKEN_KINDS",
    "UNIT_ROWS",
    "last_attention",
]

TOKEN_KINDS = Function("""
TokenKinds (hidden, text_rows) => (is_visual, is_question) {
    # Questions are the text behind the first visual token.
    num_tokens = Shape <start = 0, end = 1> (hidden)
    num_text = Shape (text_rows)
    one = Constant <value = float[1] {1}> ()
    zero = Constant <value = float[1] {0}> ()
    ones_T = Expand (one, num_tokens)
    zeros_X = Expand (zero, num_text)
    visual_T = ScatterElements <axis = 0> (ones_T, text_rows, zeros_X)
    first_axis = Constant <value_int = 0> ()
    visual_so_far_T = CumSum (visual_T, first_axis)
    behind_T = Greater (visual_so_far_T, zero)
    is_visual = Greater (visual_T, zero)
    is_text = Not (is_visual)
    is_question = And (is_text, behind_T)
}
""")
"""hidden [T, D] and text rows [X] -> which tokens are visual, and which are text behind them, [T] bool each."""

UNIT_ROWS = Function("""
UnitRows (rows) => (unit, is_usable) {
    rows_TD = Cast <to = 1> (rows)
    last_axis = Constant <value_ints = [1]> ()
    # ReduceL2 adds up one by one on ONNX Runtime, and is five times less exact.
    squares_TD = Mul (rows_TD, rows_TD)
    square_T = ReduceSum <keepdims = 0> (squares_TD, last_axis)
    norm_T = Sqrt (square_T)
    zero = Constant <value_float = 0.0> ()
    one = Constant <value_float = 1.0> ()
    infinity = Constant <value = float {inf}> ()
    is_positive = Greater (norm_T, zero)
    is_finite = Less (norm_T, infinity)
    is_usable = And (is_positive, is_finite)
    usable_T1 = Unsqueeze (is_usable, last_axis)
    divisor_T = Where (is_usable, norm_T, one)
    divisor_T1 = Unsqueeze (divisor_T, last_axis)
    safe_TD = Where (usable_T1, rows_TD, zero)
    unit = Div (safe_TD, divisor_T1)
}
""")
"""[T, D] -> rows of length 1, FP32, and which of them have a direction at all [T] bool; zeros for the others."""

LAST_LOGITS = Function("""
LastLogits <scale> (query, key) => (logits) {
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
    logits = Mul (product_1GrT, scale_factor)
}
""")
"""Query [1, H, 1, d] and keys [1, G, T, d] -> [1, G, H/G, T] FP32."""


def last_attention(op: NodeWriter, view: GraphView) -> "ir.Value":
    """The attention of the last prompt token to each token, [1, G, H/G, T] FP32."""
    assert view.query is not None and view.key is not None
    (logits,) = op.apply(LAST_LOGITS, view.query, view.key, scale=view.scale)
    return op.Softmax(logits, axis=-1)


DESCENDING_RANK = Function("""
DescendingRank (amounts, candidates) => (ranks) {
    # By counting, so that any number of tokens will do and equals keep their order.
    lowest = Constant <value_float = -3.4028234e38> ()
    none = Constant <value = float {-inf}> ()
    is_nan_T = IsNaN (amounts)
    known_T = Where (is_nan_T, lowest, amounts)
    finite_T = Max (known_T, lowest)
    amounts_T = Where (candidates, finite_T, none)
    first_axis = Constant <value_ints = [0]> ()
    second_axis = Constant <value_ints = [1]> ()
    own_T1 = Unsqueeze (amounts_T, second_axis)
    other_1T = Unsqueeze (amounts_T, first_axis)
    higher_TT = Greater (other_1T, own_T1)
    equal_TT = Equal (other_1T, own_T1)
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    num_tokens = Size (amounts)
    index_T = Range (zero, num_tokens, one)
    own_index_T1 = Unsqueeze (index_T, second_axis)
    other_index_1T = Unsqueeze (index_T, first_axis)
    earlier_TT = Less (other_index_1T, own_index_T1)
    tied_TT = And (equal_TT, earlier_TT)
    ahead_TT = Or (higher_TT, tied_TT)
    ahead_count_TT = Cast <to = 1> (ahead_TT)
    ranks = ReduceSum <keepdims = 0> (ahead_count_TT, second_axis)
}
""")
"""Amounts [T] FP32 and candidates [T] bool -> how many are ahead of each [T], NaN behind all other candidates."""

RANK_SCORES = Function("""
RankScores (ranks, num_keep) => (amounts) {
    limit = Cast <to = 1> (num_keep)
    left_T = Sub (limit, ranks)
    zero = Constant <value_float = 0.0> ()
    amounts = Max (left_T, zero)
}
""")
"""Ranks [T] -> num_keep - rank for those that stay and 0 for the others, [T]."""
