"""CDPruner (arXiv 2506.10967): the tokens that span the most, each by its relevance to the text; a conditional DPP.

The kernel is L = diag(r) S diag(r): S the cosines between visual tokens as the decoder takes them, r the min-max
normalised mean cosine to the text. The greedy MAP takes at each step the token that adds most to log det L. Text is the
embeddings of the prompt behind its first visual token; the authors take CLIP's, and relevance with the other sign.

Ours is that a token of which those chosen explain all but a thousandth adds nothing: rounding would decide among what
is left of such tokens, so they come last, by relevance.
"""

from typing import TYPE_CHECKING

from capa_export.selectors.selector import Function, GraphView, NodeWriter, Selector, Size, TensorView
from capa_export.selectors.text import TOKEN_KINDS, UNIT_ROWS

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import Tensor

__all__ = ["SELECTOR"]


_FUNCTION = Function("""
ConditionalDPP (unit, is_usable, is_visual, is_question, num_keep) => (amounts) {
    zero = Constant <value_float = 0.0> ()
    one = Constant <value_float = 1.0> ()
    first_axis = Constant <value_ints = [0]> ()
    second_axis = Constant <value_ints = [1]> ()
    start = Constant <value_int = 0> ()
    step = Constant <value_int = 1> ()
    num_tokens = Shape (is_visual)
    num_tokens_number = Squeeze (num_tokens, first_axis)
    index_T = Range (start, num_tokens_number, step)
    zeros_T = Expand (zero, num_tokens)
    cosine_TT = Gemm <transB = 1> (unit, unit)
    question_T = Cast <to = 1> (is_question)
    question_1T = Unsqueeze (question_T, first_axis)
    text_1D = MatMul (question_1T, unit)
    num_question = ReduceSum (question_T, first_axis)
    text_count = Max (num_question, one)
    mean_text_1D = Div (text_1D, text_count)
    shared_TD = Mul (unit, mean_text_1D)
    relevance_T = ReduceSum <keepdims = 0> (shared_TD, second_axis)
    counts_T = And (is_usable, is_visual)
    highest = Constant <value_float = 2.0> ()
    lowest = Constant <value_float = -2.0> ()
    for_least_T = Where (counts_T, relevance_T, highest)
    for_most_T = Where (counts_T, relevance_T, lowest)
    least = ReduceMin (for_least_T, first_axis)
    most = ReduceMax (for_most_T, first_axis)
    # A common factor of r changes no choice, so that the range needs no more care than this.
    offset = Constant <value_float = 1e-6> ()
    above_T = Sub (relevance_T, least)
    above_zero_T = Add (above_T, offset)
    range = Sub (most, least)
    range_above_zero = Add (range, offset)
    weight_T = Div (above_zero_T, range_above_zero)
    weight_T1 = Unsqueeze (weight_T, second_axis)
    weight_1T = Unsqueeze (weight_T, first_axis)
    row_weighted_TT = Mul (cosine_TT, weight_T1)
    kernel_TT = Mul (row_weighted_TT, weight_1T)
    weight_squares_T = Mul (weight_T, weight_T)
    diagonal_T = Where (is_usable, weight_squares_T, zero)
    # What is left of each token's diagonal: below `noise` of it no more than the order of relevance, scaled far below
    # any other; -1 where it cannot be chosen.
    noise = Constant <value_float = 1e-3> ()
    limit_T = Mul (diagonal_T, noise)
    far_below = Constant <value_float = 8.271806e-25> ()
    order_T = Mul (diagonal_T, far_below)
    gone = Constant <value_float = -1.0> ()
    residual_T = Where (is_visual, diagonal_T, gone)
    factor_shape = Concat <axis = 0> (num_keep, num_tokens)
    factor_KT = Expand (zero, factor_shape)
    rounds = Squeeze (num_keep, first_axis)
    more = Constant <value = bool {1}> ()
    last_residual_T, last_factor_KT, amounts = Loop <body = greedy_map
        (int64 round, bool go_on, float[T] left_T, float[K, T] rows_KT, float[T] amount_T)
        => (bool still_more, float[T] next_left_T, float[K, T] next_rows_KT, float[T] next_amount_T) {
        still_more = Identity (go_on)
        best = ReduceMax (left_T, first_axis)
        is_best_T = Equal (left_T, best)
        best_index_T = Where (is_best_T, index_T, num_tokens)
        chosen = ReduceMin (best_index_T, first_axis)
        kernel_1T = Gather <axis = 0> (kernel_TT, chosen)
        factor_K1 = Gather <axis = 1> (rows_KT, chosen)
        factor_1K = Transpose <perm = [1, 0]> (factor_K1)
        explained_1T = MatMul (factor_1K, rows_KT)
        unexplained_1T = Sub (kernel_1T, explained_1T)
        threshold = Constant <value_float = 1e-20> ()
        adds = Greater (best, threshold)
        safe_best = Where (adds, best, one)
        root = Sqrt (safe_best)
        row_1T = Div (unexplained_1T, root)
        added_1T = Where (adds, row_1T, zero)
        slot_1 = Unsqueeze (round, first_axis)
        slot_11 = Unsqueeze (slot_1, first_axis)
        next_rows_KT = ScatterND (rows_KT, slot_11, added_1T)
        added_T = Squeeze (added_1T, first_axis)
        added_squares_T = Mul (added_T, added_T)
        reduced_T = Sub (left_T, added_squares_T)
        is_noise_T = LessOrEqual (reduced_T, limit_T)
        kept_T = Where (is_noise_T, order_T, reduced_T)
        is_gone_T = Less (left_T, zero)
        is_chosen_T = Equal (index_T, chosen)
        is_closed_T = Or (is_gone_T, is_chosen_T)
        next_left_T = Where (is_closed_T, gone, kept_T)
        rest = Sub (num_keep, slot_1)
        rest_amount = Cast <to = 1> (rest)
        next_amount_T = Where (is_chosen_T, rest_amount, amount_T)
    }> (rounds, more, residual_T, factor_KT, zeros_T)
}
""")


def score(op: NodeWriter, view: GraphView) -> "ir.Value":
    """One row of the kernel's Cholesky factor a step."""
    kinds = op.apply(TOKEN_KINDS, view.hidden_TD, view.text_rows_X)
    return op.scores(_FUNCTION, view.text_rows_X, *op.apply(UNIT_ROWS, view.hidden_TD), *kinds, view.num_keep)


def reference(view: TensorView) -> "Tensor":
    """Gram-Schmidt on the weighted vectors, of which L is the product, in FP64: lengths of residuals, squared."""
    import torch

    norms = torch.linalg.vector_norm(view.hidden, dim=-1, keepdim=True)
    unit = torch.where((norms > 0) & (norms < torch.inf), view.hidden / norms, 0).double()
    rows = torch.where(view.is_visual)[0]
    is_question = ~view.is_visual
    is_question[: rows[0]] = False
    relevance = (unit[rows] * unit[is_question].sum(0) / max(int(is_question.sum()), 1)).sum(-1)
    is_usable = unit[rows].any(-1)
    least, most = relevance[is_usable].min(), relevance[is_usable].max()
    weight = (relevance - least + 1e-6) / (most - least + 1e-6)
    residual, whole = weight[:, None] * unit[rows], weight**2 * is_usable
    amount = whole.clone()
    scores = torch.zeros(len(view.is_visual))
    for rank in range(view.num_keep):
        chosen = amount.argmax()
        scores[rows[chosen]] = view.num_keep - rank
        if amount[chosen] > 1e-3 * whole[chosen]:
            direction = residual[chosen] / residual[chosen].norm()
            residual = residual - (residual @ direction)[:, None] * direction
        left = residual.square().sum(-1)
        # Below any that is more than noise, those that are not come by relevance.
        amount = torch.where(amount < 0, amount, torch.where(left > 1e-3 * whole, left, whole * 2.0**-80))
        amount[chosen] = -1
    return scores


def flops(size: Size) -> int:
    """The cosines, and a row of the Cholesky factor for each token kept."""
    cosines = 2 * size.tokens * size.tokens * size.dims.hidden_size
    return cosines + 2 * size.keep * size.keep * size.tokens


SELECTOR = Selector(
    score=score,
    reference=reference,
    flops=flops,
    place="input",
    graded=False,
)
