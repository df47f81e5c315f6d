"""IWP-style, after arXiv 2604.00757: tokens as rank-1 updates of an implicit weight, chosen by size and duplication.

The paper reads attention as q W with W = sum_i phi(k_i)^T v_i, and keeps the updates that keep W, by information
magnitude, information duplication and progressive chunked MMR. Its formulas are not public; ours follow from that form:
magnitude is the mean over heads of a_i ||v_i||, duplication the mean over KV heads of the cosine of two updates,
exp(-||k_i - k_j||^2 / (2 sqrt d)) cos(v_i, v_j), and a chunk is an equal part of the tokens to keep.

Keys, values and a query are a layer's, so it acts in the decoder; before it there is none of them.
"""

from typing import TYPE_CHECKING

from capa_export.selectors import _mmr
from capa_export.selectors.selector import Function, GraphView, NodeWriter, Option, Selector, Size, TensorView
from capa_export.selectors.text import last_attention

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import Tensor

__all__ = ["SELECTOR"]


_UPDATES = Function("""
ImplicitUpdates <scale> (attention, key, value) => (magnitude, similarity) {
    key_1GTd = Cast <to = 1> (key)
    value_1GTd = Cast <to = 1> (value)
    rest = Constant <value_ints = [-1]> ()
    value_squares_1GT1 = ReduceSumSquare (value_1GTd, rest)
    value_norm_1GT1 = Sqrt (value_squares_1GT1)
    value_norm_1G1T = Transpose <perm = [0, 1, 3, 2]> (value_norm_1GT1)
    size_1GrT = Mul (attention, value_norm_1G1T)
    heads = Constant <value_ints = [0, 1, 2]> ()
    magnitude = ReduceMean <keepdims = 0> (size_1GrT, heads)
    # Cosines of values; one that is zero is like no other.
    zero = Constant <value_float = 0.0> ()
    unit = Constant <value_float = 1.0> ()
    has_norm_1GT1 = Greater (value_norm_1GT1, zero)
    divisor_1GT1 = Where (has_norm_1GT1, value_norm_1GT1, unit)
    unit_1GTd = Div (value_1GTd, divisor_1GT1)
    unit_1GdT = Transpose <perm = [0, 1, 3, 2]> (unit_1GTd)
    cosine_1GTT = MatMul (unit_1GTd, unit_1GdT)
    # The kernel of keys: softmax's own feature map, normed.
    key_squares_1GT1 = ReduceSumSquare (key_1GTd, rest)
    key_squares_1G1T = Transpose <perm = [0, 1, 3, 2]> (key_squares_1GT1)
    both_1GTT = Add (key_squares_1GT1, key_squares_1G1T)
    key_1GdT = Transpose <perm = [0, 1, 3, 2]> (key_1GTd)
    overlap_1GTT = MatMul (key_1GTd, key_1GdT)
    overlaps_1GTT = Add (overlap_1GTT, overlap_1GTT)
    difference_1GTT = Sub (both_1GTT, overlaps_1GTT)
    distance_1GTT = Max (difference_1GTT, zero)
    minus_half = Constant <value_float = -0.5> ()
    scale_factor = Constant <value_float: float = @scale> ()
    factor = Mul (minus_half, scale_factor)
    exponent_1GTT = Mul (distance_1GTT, factor)
    kernel_1GTT = Exp (exponent_1GTT)
    alike_1GTT = Mul (kernel_1GTT, cosine_1GTT)
    kv_head_axes = Constant <value_ints = [0, 1]> ()
    mean_TT = ReduceMean <keepdims = 0> (alike_1GTT, kv_head_axes)
    is_nan_TT = IsNaN (mean_TT)
    similarity = Where (is_nan_TT, zero, mean_TT)
}
""")


def score(op: NodeWriter, view: GraphView, *, balance: Option, chunks: Option) -> "ir.Value":
    """Chunked MMR of the updates' magnitudes and duplication."""
    assert view.key is not None and view.value is not None
    attention = last_attention(op, view)
    magnitude_T, similarity_TT = op.apply(_UPDATES, attention, view.key, view.value, scale=view.scale)
    return _mmr.choose(op, view, magnitude_T, similarity_TT, balance=balance, chunks=chunks)


def reference(view: TensorView, *, balance: Option, chunks: Option) -> "Tensor":
    """Compute magnitudes and duplication from distances between keys, KV head by KV head."""
    import torch

    assert view.attention is not None and view.key is not None and view.value is not None
    per_kv_head = view.attention.unflatten(0, (len(view.value), -1))
    magnitude_T = (per_kv_head * view.value.norm(dim=-1)[:, None]).mean((0, 1))
    similarity_TT = torch.zeros(len(magnitude_T), len(magnitude_T))
    for key, value in zip(view.key, view.value, strict=True):
        apart = torch.cdist(key, key, compute_mode="donot_use_mm_for_euclid_dist")
        cosine = torch.nn.functional.cosine_similarity(value[:, None], value[None], dim=-1)
        similarity_TT += torch.exp(-(apart**2) / (2 * key.shape[-1] ** 0.5)) * cosine / len(view.key)
    return _mmr.choose_eagerly(view, magnitude_T, similarity_TT.nan_to_num(0), balance=balance, chunks=chunks)


def flops(size: Size) -> int:
    """The last query's row of QK^T, every key with every key, every value with every value, and the choice."""
    row = 2 * size.tokens * size.dims.num_heads * size.dims.head_dim
    pairs = 4 * size.tokens * size.tokens * size.dims.num_kv_heads * size.dims.head_dim
    return row + pairs + _mmr.flops_of_choice(size)


SELECTOR = Selector(
    score=score,
    reference=reference,
    flops=flops,
    place="attention",
    graded=False,
    options=_mmr.OPTIONS,
)
