"""AdaFV-style (after arXiv 2501.09532): some tokens for their saliency, some for their likeness to the question.

That the share of either adapts is the paper's idea, whose formula is not public. Ours: a token is as like the question
as the text token that is nearest to it; of all splits of the tokens that stay, the one that keeps the largest geometric
mean of saliency and likeness is taken; and where both want the same tokens, the sum of the two fills the gap.
"""

from typing import TYPE_CHECKING

from capa_export.selectors.selector import Function, GraphView, NodeWriter, Option, Selector, Setting, Size, TensorView
from capa_export.selectors.text import DESCENDING_RANK, RANK_SCORES, TOKEN_KINDS, UNIT_ROWS

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import Tensor

__all__ = ["SELECTOR"]


_SHARES = Function("""
AdaptiveShares <temperature> (saliency, unit, is_usable, is_visual, is_question) => (visual, textual, mixture) {
    # Two distributions over the visual tokens, and their sum.
    zero = Constant <value_float = 0.0> ()
    one = Constant <value_float = 1.0> ()
    first_axis = Constant <value_ints = [0]> ()
    second_axis = Constant <value_ints = [1]> ()
    saliency_T = Cast <to = 1> (saliency)
    infinity = Constant <value = float {inf}> ()
    is_positive_T = Greater (saliency_T, zero)
    is_finite_T = Less (saliency_T, infinity)
    is_amount_T = And (is_positive_T, is_finite_T)
    is_salient_T = And (is_amount_T, is_visual)
    salient_T = Where (is_salient_T, saliency_T, zero)
    total = ReduceSum <keepdims = 1> (salient_T, first_axis)
    is_some = Greater (total, zero)
    divisor = Where (is_some, total, one)
    visual = Div (salient_T, divisor)
    unit_DT = Transpose <perm = [1, 0]> (unit)
    cosine_TT = MatMul (unit, unit_DT)
    is_query_T = And (is_question, is_usable)
    other_is_query_1T = Unsqueeze (is_query_T, first_axis)
    lowest = Constant <value_float = -1.0> ()
    queried_TT = Where (other_is_query_1T, cosine_TT, lowest)
    likeness_T = ReduceMax <keepdims = 0> (queried_TT, second_axis)
    softness = Constant <value_float: float = @temperature> ()
    logit_T = Div (likeness_T, softness)
    none = Constant <value = float {-inf}> ()
    is_choice_T = And (is_visual, is_usable)
    choice_logit_T = Where (is_choice_T, logit_T, none)
    highest = ReduceMax <keepdims = 1> (choice_logit_T, first_axis)
    below_T = Sub (choice_logit_T, highest)
    power_T = Exp (below_T)
    choice_power_T = Where (is_choice_T, power_T, zero)
    power = ReduceSum <keepdims = 1> (choice_power_T, first_axis)
    has_power = Greater (power, zero)
    power_or_one = Where (has_power, power, one)
    textual = Div (choice_power_T, power_or_one)
    mixture = Add (visual, textual)
}
""")

_UNION = Function("""
AdaptiveUnion (visual, textual, visual_ranks, textual_ranks, mixture_ranks, num_keep) => (order) {
    # Mass of the best j of either, j = 0, 1, ...; with T_v of the one, num_keep - T_v of the other.
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    first_axis = Constant <value_ints = [0]> ()
    second_axis = Constant <value_ints = [1]> ()
    num_tokens = Size (visual)
    index_T = Range (zero, num_tokens, one)
    visual_slot_T = Cast <to = 7> (visual_ranks)
    textual_slot_T = Cast <to = 7> (textual_ranks)
    visual_sorted_T = ScatterElements <axis = 0> (visual, visual_slot_T, visual)
    textual_sorted_T = ScatterElements <axis = 0> (textual, textual_slot_T, textual)
    visual_mass_T = CumSum <exclusive = 1> (visual_sorted_T, zero)
    textual_mass_T = CumSum <exclusive = 1> (textual_sorted_T, zero)
    rest_T = Sub (num_keep, index_T)
    # Nothing is left, and no mass, where T_v alone is more than stay.
    rest_or_zero_T = Max (rest_T, zero)
    rest_mass_T = Gather <axis = 0> (textual_mass_T, rest_or_zero_T)
    product_T = Mul (visual_mass_T, rest_mass_T)
    product_1T = Unsqueeze (product_T, first_axis)
    num_visual_int = ArgMax <axis = 1, keepdims = 0> (product_1T)
    num_textual_int = Sub (num_keep, num_visual_int)
    num_visual = Cast <to = 1> (num_visual_int)
    num_textual = Cast <to = 1> (num_textual_int)
    is_salient_T = Less (visual_ranks, num_visual)
    is_like_T = Less (textual_ranks, num_textual)
    is_chosen_T = Or (is_salient_T, is_like_T)
    # The union first, then what fills it up, each by the mixture.
    num_tokens_float = Cast <to = 1> (num_tokens)
    behind_T = Add (mixture_ranks, num_tokens_float)
    key_T = Where (is_chosen_T, mixture_ranks, behind_T)
    own_T1 = Unsqueeze (key_T, second_axis)
    other_1T = Unsqueeze (key_T, first_axis)
    ahead_TT = Less (other_1T, own_T1)
    ahead_count_TT = Cast <to = 1> (ahead_TT)
    order = ReduceSum <keepdims = 0> (ahead_count_TT, second_axis)
}
""")


def score(op: NodeWriter, view: GraphView, *, temperature: Option) -> "ir.Value":
    """Ranks by the mixture, of the union of the most salient and the most like a question token."""
    assert view.visual_saliency is not None
    is_visual, is_question = op.apply(TOKEN_KINDS, view.hidden_TD, view.text_rows_X)
    unit, is_usable = op.apply(UNIT_ROWS, view.hidden_TD)
    shares = op.apply(
        _SHARES,
        *(view.visual_saliency, unit, is_usable, is_visual, is_question),
        temperature=float(temperature),
    )
    visual_ranks, textual_ranks, mixture_ranks = (op.apply(DESCENDING_RANK, share, is_visual)[0] for share in shares)
    visual, textual, _ = shares
    (order,) = op.apply(_UNION, visual, textual, visual_ranks, textual_ranks, mixture_ranks, view.num_keep)
    return op.scores(RANK_SCORES, view.text_rows_X, order, view.num_keep)


def reference(view: TensorView, *, temperature: Option) -> "Tensor":
    """Every split is tried; the one with the fewest for their saliency wins a tie."""
    import torch

    assert view.visual_saliency is not None
    rows = torch.where(view.is_visual)[0]
    unit = torch.nn.functional.normalize(view.hidden, dim=-1)
    has_direction = view.hidden.isfinite().all(dim=1) & view.hidden.any(dim=1)
    is_question = ~view.is_visual & has_direction
    is_question[: rows[0]] = False
    saliency = view.visual_saliency[rows].nan_to_num(nan=0, posinf=0).clamp(min=0)
    visual = saliency / saliency.sum() if saliency.sum() > 0 else saliency
    likeness = (unit[rows] @ unit[is_question].T).amax(dim=1) if is_question.any() else torch.zeros(len(rows))
    textual = torch.zeros(len(rows))
    usable = has_direction[rows]
    textual[usable] = torch.softmax(likeness[usable] / float(temperature), dim=0)
    by_saliency, by_likeness, by_both = (
        share.argsort(descending=True, stable=True) for share in (visual, textual, visual + textual)
    )
    splits = [(count, view.num_keep - count) for count in range(view.num_keep + 1)]
    num_visual, num_textual = max(
        splits, key=lambda split: visual[by_saliency[: split[0]]].sum() * textual[by_likeness[: split[1]]].sum()
    )
    union = {*by_saliency[:num_visual].tolist(), *by_likeness[:num_textual].tolist()}
    in_order = by_both.tolist()
    order = [index for index in in_order if index in union] + [index for index in in_order if index not in union]
    scores = torch.zeros(len(view.is_visual))
    scores[rows[order[: view.num_keep]]] = torch.arange(view.num_keep, 0, -1.0)
    return scores


def flops(size: Size) -> int:
    """The cosine of every two tokens."""
    return 2 * size.tokens**2 * size.dims.hidden_size


SELECTOR = Selector(
    score=score,
    reference=reference,
    flops=flops,
    place="input",
    graded=False,
    reads=("visual_saliency",),
    # Of the softmax over cosines: near their own spread, so that likeness is neither flat nor all of one token.
    options={"temperature": Setting(0.1, least=1e-6)},
)
