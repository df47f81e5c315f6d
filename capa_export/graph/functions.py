"""The CAPA operators as ONNX functions of domain `capa`: any runtime runs their bodies.

T = prompt tokens, K = tokens kept, X = text tokens, D = hidden size, H = query heads, G = KV heads, d = head size.
Of a weight, I = inputs, O = outputs, G = groups of g inputs.
"""

from functools import cache

import onnx
import onnx_ir as ir

from capa_export.graph.opset import OPSET

__all__ = ["DOMAIN", "FP4_GROUP", "FP4_WEIGHT", "FUNCTIONS", "KEEP_TEXT", "PLUGIN", "parse_function"]

DOMAIN = "capa"

PLUGIN = {"plugin_namespace": DOMAIN, "plugin_version": "1"}
"""Attributes of every node: what its TensorRT plugin is registered as."""

FP4_GROUP = 16
"""Inputs of an NVFP4 weight that share a scale."""

_CONTRIBUTION_SCORE = """
ContributionScore <scale> (query, key, value, output_weight, text_positions) => (scores) {
    # || concat_h(a_h * v_g(h)) W_O ||_2 (CAPA, eq. 2) of every token for one query, all of it in FP32.
    query_1H1d = Cast <to = 1> (query)
    key_1GTd = Cast <to = 1> (key)
    value_1GTd = Cast <to = 1> (value)
    weight_DHd = Cast <to = 1> (output_weight)
    one = Constant <value_ints = [1]> ()
    rest = Constant <value_ints = [-1]> ()
    kv_heads = Shape <start = 1, end = 2> (key)
    num_tokens = Shape <start = 2, end = 3> (key)
    head_size = Shape <start = 3, end = 4> (key)
    grouped = Concat <axis = 0> (one, kv_heads, rest, head_size)
    query_1Grd = Reshape (query_1H1d, grouped)
    key_1GdT = Transpose <perm = [0, 1, 3, 2]> (key_1GTd)
    product_1GrT = MatMul (query_1Grd, key_1GdT)
    scale_factor = Constant <value_float: float = @scale> ()
    logits_1GrT = Mul (product_1GrT, scale_factor)
    attention_1GrT = Softmax <axis = -1> (logits_1GrT)
    attention_TGr1 = Transpose <perm = [3, 1, 2, 0]> (attention_1GrT)
    value_TG1d = Transpose <perm = [2, 1, 0, 3]> (value_1GTd)
    weighted_TGrd = Mul (attention_TGr1, value_TG1d)
    rows = Concat <axis = 0> (num_tokens, rest)
    weighted_THd = Reshape (weighted_TGrd, rows)
    written_TD = Gemm <transB = 1> (weighted_THd, weight_DHd)
    last_axis = Constant <value_ints = [1]> ()
    squares_T = ReduceSumSquare <keepdims = 0> (written_TD, last_axis)
    norm_T = Sqrt (squares_T)
    # An overflowed score must not tie with text.
    largest = Constant <value_float = 3.4028234e38> ()
    finite_T = Min (norm_T, largest)
    text_shape = Shape (text_positions)
    infinity = Constant <value = float[1] {inf}> ()
    text_scores = Expand (infinity, text_shape)
    scores = ScatterElements <axis = 0> (finite_T, text_positions, text_scores)
}
"""

_TOPK_KEEP = """
TopKKeep <min_keep_per_image> (scores, num_keep) => (kept) {
    # Ranks by counting, so that any K is exact, ties go to the lowest index and NaN never wins.
    lowest = Constant <value = float {-inf}> ()
    is_nan = IsNaN (scores)
    scores_T = Where (is_nan, lowest, scores)
    first_axis = Constant <value_ints = [0]> ()
    second_axis = Constant <value_ints = [1]> ()
    own_T1 = Unsqueeze (scores_T, second_axis)
    other_1T = Unsqueeze (scores_T, first_axis)
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    num_tokens = Size (scores)
    index_T = Range (zero, num_tokens, one)
    own_index_T1 = Unsqueeze (index_T, second_axis)
    other_index_1T = Unsqueeze (index_T, first_axis)
    higher_TT = Greater (other_1T, own_T1)
    equal_TT = Equal (other_1T, own_T1)
    earlier_TT = Less (other_index_1T, own_index_T1)
    tied_TT = And (equal_TT, earlier_TT)
    ahead_TT = Or (higher_TT, tied_TT)
    # An image is a run of tokens between two of text, whose score is infinite. Its best few come before all others.
    is_text_T = IsInf <detect_negative = 0> (scores)
    is_text_count_T = Cast <to = 7> (is_text_T)
    image_T = CumSum (is_text_count_T, zero)
    own_image_T1 = Unsqueeze (image_T, second_axis)
    other_image_1T = Unsqueeze (image_T, first_axis)
    same_image_TT = Equal (own_image_T1, other_image_1T)
    is_visual_T = Not (is_text_T)
    other_visual_1T = Unsqueeze (is_visual_T, first_axis)
    same_visual_TT = And (same_image_TT, other_visual_1T)
    ahead_in_image_TT = And (ahead_TT, same_visual_TT)
    ahead_in_image_count_TT = Cast <to = 1> (ahead_in_image_TT)
    rank_in_image_T = ReduceSum <keepdims = 0> (ahead_in_image_count_TT, second_axis)
    guaranteed_count = Constant <value_int: int = @min_keep_per_image> ()
    guaranteed_limit = Cast <to = 1> (guaranteed_count)
    best_of_image_T = Less (rank_in_image_T, guaranteed_limit)
    first_T = Or (is_text_T, best_of_image_T)
    own_first_T1 = Unsqueeze (first_T, second_axis)
    other_first_1T = Unsqueeze (first_T, first_axis)
    own_later_T1 = Not (own_first_T1)
    before_TT = And (other_first_1T, own_later_T1)
    either_TT = Or (other_first_1T, own_later_T1)
    ahead_alike_TT = And (ahead_TT, either_TT)
    ahead_first_TT = Or (before_TT, ahead_alike_TT)
    ahead_count_TT = Cast <to = 1> (ahead_first_TT)
    rank_T = ReduceSum <keepdims = 0> (ahead_count_TT, second_axis)
    limit = Cast <to = 1> (num_keep)
    keep_T = Less (rank_T, limit)
    # Kept tokens go to the front and the others behind them, each in order: one scatter, then a slice.
    keep_count_T = Cast <to = 7> (keep_T)
    kept_so_far_T = CumSum (keep_count_T, zero)
    kept_slot_T = Sub (kept_so_far_T, one)
    dropped_so_far_T = Sub (index_T, kept_so_far_T)
    dropped_slot_T = Add (dropped_so_far_T, num_keep)
    slot_T = Where (keep_T, kept_slot_T, dropped_slot_T)
    order_T = ScatterElements <axis = 0> (index_T, slot_T, index_T)
    kept = Slice (order_T, first_axis, num_keep, first_axis)
}
"""

_TOKEN_GATHER = """
TokenGather (hidden, key, value, cos, sin, kept) => (hidden_kept, key_kept, value_kept, cos_kept, sin_kept) {
    # Everything of a layer that has one row a token, so that a kernel takes one pass over it.
    hidden_kept = Gather <axis = 0> (hidden, kept)
    key_kept = Gather <axis = 2> (key, kept)
    value_kept = Gather <axis = 2> (value, kept)
    cos_kept = Gather <axis = 1> (cos, kept)
    sin_kept = Gather <axis = 1> (sin, kept)
}
"""

_VISUAL_SCALE = """
VisualScale (x, scale, text, text_rows) => (y) {
    # x * scale where a visual token stands, the given rows where text stands.
    scaled_TD = Mul (x, scale)
    last_axis = Constant <value_ints = [1]> ()
    index_X1 = Unsqueeze (text_rows, last_axis)
    y = ScatterND (scaled_TD, index_X1, text)
}
"""

_KEEP_TEXT = """
KeepText (amounts, text_positions) => (scores) {
    # Text always stays; an amount that overflowed must not tie with it.
    largest = Constant <value_float = 3.4028234e38> ()
    finite_T = Min (amounts, largest)
    text_shape = Shape (text_positions)
    infinity = Constant <value = float[1] {inf}> ()
    text_scores = Expand (infinity, text_shape)
    scores = ScatterElements <axis = 0> (finite_T, text_positions, text_scores)
}
"""

_FP4_WEIGHT = """
FP4Weight (numbers, scales, outer) => (weight) {
    # Numbers [I, O] of two an octet, the first in the low bits: a sign, two bits of exponent and one of mantissa. Of
    # every 16 inputs and an output, one scale: FP8 under one of FP32.
    low_bits = Constant <value = uint8 {15}> ()
    half_octet = Constant <value = uint8 {4}> ()
    even_codes = BitwiseAnd (numbers, low_bits)
    odd_codes = BitShift <direction = "RIGHT"> (numbers, half_octet)
    last_axis = Constant <value_ints = [-1]> ()
    even = Unsqueeze (even_codes, last_axis)
    odd = Unsqueeze (odd_codes, last_axis)
    pairs = Concat <axis = -1> (even, odd)
    index = Cast <to = 6> (pairs)
    meant = Constant <value = float[16] {0, 0.5, 1, 1.5, 2, 3, 4, 6, -0, -0.5, -1, -1.5, -2, -3, -4, -6}> ()
    values = Gather (meant, index)
    # No DequantizeLinear: ONNX Runtime would not compute that once, when the file is opened.
    scales_wide = Cast <to = 1> (scales)
    scales_GO = Mul (scales_wide, outer)
    middle_axis = Constant <value_ints = [1]> ()
    scales_G1O = Unsqueeze (scales_GO, middle_axis)
    num_groups = Shape <start = 0, end = 1> (scales)
    num_outputs = Shape <start = 1, end = 2> (scales)
    in_group = Constant <value_ints = [16]> ()
    by_group = Concat <axis = 0> (num_groups, in_group, num_outputs)
    values_GgO = Reshape (values, by_group)
    scaled_GgO = Mul (values_GgO, scales_G1O)
    whole = Concat <axis = 0> (last_axis, num_outputs)
    weight = Reshape (scaled_GgO, whole)
}
"""


@cache
def parse_function(text: str) -> ir.Function:
    """A function of domain `capa` from its text; lines that begin with # are comments."""
    body = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    header = f'<opset_import: ["": {OPSET}], domain: "{DOMAIN}">'
    return ir.serde.deserialize_function(onnx.parser.parse_function(header + body))


FUNCTIONS: dict[str, ir.Function] = {
    entry.name: entry for entry in map(parse_function, (_CONTRIBUTION_SCORE, _TOPK_KEEP, _TOKEN_GATHER, _VISUAL_SCALE))
}
"""Those that have kernels."""

KEEP_TEXT = parse_function(_KEEP_TEXT)
FP4_WEIGHT = parse_function(_FP4_WEIGHT)
