"""VisPruner (arXiv 2412.01818): the most salient tokens, and of the rest those left when duplicates are removed.

Which tokens a round may remove depends on their places in the list, which depend on the cosines of the round before: of
a few hundred tokens, cosines that differ in their last bits can leave others. That is the authors' own: what a round
leaves stays in the order of its likeness.
"""

from fractions import Fraction
from typing import TYPE_CHECKING

from capa_export.selectors.selector import Function, GraphView, NodeWriter, Option, Selector, Setting, Size, TensorView
from capa_export.selectors.text import DESCENDING_RANK, TOKEN_KINDS, UNIT_ROWS

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import Tensor

__all__ = ["SELECTOR"]


_PER_ROUND = 8
"""Most duplicates that a round removes."""
_EXTRA_ROUNDS = 2
"""Rounds at the end may remove fewer, as one can take no more than every other token."""

_FUNCTION = Function("""
RemoveDuplicates <numerator, denominator, per_round, extra_rounds>
    (ranks, unit, is_usable, is_visual, text_rows, num_keep) => (amounts) {
    # The list of those left is held as each token's position in it, -1 outside.
    outside = Constant <value_float = -1.0> ()
    zero = Constant <value_float = 0.0> ()
    half = Constant <value_float = 0.5> ()
    two = Constant <value_float = 2.0> ()
    first_axis = Constant <value_ints = [0]> ()
    second_axis = Constant <value_ints = [1]> ()
    share_numerator = Constant <value_int: int = @numerator> ()
    share_denominator = Constant <value_int: int = @denominator> ()
    share = Mul (num_keep, share_numerator)
    whole_share = Div (share, share_denominator)
    num_important = Cast <to = 1> (whole_share)
    limit = Cast <to = 1> (num_keep)
    num_diverse = Sub (limit, num_important)
    behind_T = Sub (ranks, num_important)
    is_behind_T = GreaterOrEqual (behind_T, zero)
    is_listed_T = And (is_behind_T, is_visual)
    start_T = Where (is_listed_T, behind_T, outside)
    unit_FT = Transpose <perm = [1, 0]> (unit)
    cosine_TT = MatMul (unit, unit_FT)
    # What has no direction is removed first; whoever may not be removed comes last.
    no_direction = Constant <value_float = 2.0> ()
    no_partner = Constant <value_float = -2.0> ()
    not_removable = Constant <value_float = -4.0> ()
    most_int = Constant <value_int: int = @per_round> ()
    most = Cast <to = 1> (most_int)
    num_tokens = Shape (ranks)
    num_text = Shape (text_rows)
    num_visual = Sub (num_tokens, num_text)
    to_remove = Sub (num_visual, num_keep)
    one = Constant <value_int = 1> ()
    most_less_one = Sub (most_int, one)
    rounded_up = Add (to_remove, most_less_one)
    full_rounds = Div (rounded_up, most_int)
    extra = Constant <value_int: int = @extra_rounds> ()
    rounds_1 = Add (full_rounds, extra)
    rounds = Squeeze (rounds_1, first_axis)
    always = Constant <value = bool {1}> ()
    left_T = Loop (rounds, always, start_T) <body = remove (
        int64 i, bool go, float[T] position_T
    ) => (bool go_on, float[T] next_T) {
        go_on = Identity (go)
        is_left_T = GreaterOrEqual (position_T, zero)
        left_count_T = Cast <to = 1> (is_left_T)
        num_left = ReduceSum <keepdims = 1> (left_count_T, first_axis)
        halved_T = Mul (position_T, half)
        pair_T = Floor (halved_T)
        even_T = Mul (pair_T, two)
        is_even_T = Equal (even_T, position_T)
        is_odd_T = Not (is_even_T)
        is_removable_T = And (is_left_T, is_even_T)
        is_partner_T = And (is_left_T, is_odd_T)
        other_is_partner_1T = Unsqueeze (is_partner_T, first_axis)
        partner_TT = Where (other_is_partner_1T, cosine_TT, no_partner)
        nearest_T = ReduceMax <keepdims = 0> (partner_TT, second_axis)
        likeness_T = Where (is_usable, nearest_T, no_direction)
        amount_T = Where (is_removable_T, likeness_T, not_removable)
        own_T1 = Unsqueeze (amount_T, second_axis)
        other_1T = Unsqueeze (amount_T, first_axis)
        own_position_T1 = Unsqueeze (position_T, second_axis)
        other_position_1T = Unsqueeze (position_T, first_axis)
        higher_TT = Greater (other_1T, own_T1)
        equal_TT = Equal (other_1T, own_T1)
        earlier_TT = Less (other_position_1T, own_position_T1)
        tied_TT = And (equal_TT, earlier_TT)
        ahead_TT = Or (higher_TT, tied_TT)
        ahead_count_TT = Cast <to = 1> (ahead_TT)
        rank_T = ReduceSum <keepdims = 0> (ahead_count_TT, second_axis)
        half_left = Mul (num_left, half)
        num_removable = Ceil (half_left)
        too_many = Sub (num_left, num_diverse)
        possible = Min (num_removable, too_many)
        wanted = Min (possible, most)
        num_removed = Max (wanted, zero)
        survivor_T = Sub (rank_T, num_removed)
        removable_next_T = Max (survivor_T, outside)
        num_survivors = Sub (num_removable, num_removed)
        partner_next_T = Add (pair_T, num_survivors)
        kept_next_T = Where (is_partner_T, partner_next_T, outside)
        round_T = Where (is_removable_T, removable_next_T, kept_next_T)
        is_needed = Greater (num_removed, zero)
        next_T = Where (is_needed, round_T, position_T)
    }>
    is_diverse_T = GreaterOrEqual (left_T, zero)
    diverse_rank_T = Add (left_T, num_important)
    is_important_T = Less (ranks, num_important)
    important_rank_T = Where (is_important_T, ranks, limit)
    final_rank_T = Where (is_diverse_T, diverse_rank_T, important_rank_T)
    amount_or_less_T = Sub (limit, final_rank_T)
    amounts = Max (amount_or_less_T, zero)
}
""")


def score(op: NodeWriter, view: GraphView, *, important: Option) -> "ir.Value":
    """Ranks by saliency, then by place in the list that is left."""
    assert view.visual_saliency is not None and view.visual_features is not None
    fraction = _fraction(important)
    is_visual, _ = op.apply(TOKEN_KINDS, view.hidden_TD, view.text_rows_X)
    (ranks,) = op.apply(DESCENDING_RANK, view.visual_saliency, is_visual)
    unit, is_usable = op.apply(UNIT_ROWS, view.visual_features)
    return op.scores(
        _FUNCTION,
        view.text_rows_X,
        *(ranks, unit, is_usable, is_visual, view.text_rows_X, view.num_keep),
        numerator=fraction.numerator,
        denominator=fraction.denominator,
        per_round=_PER_ROUND,
        extra_rounds=_EXTRA_ROUNDS,
    )


def reference(view: TensorView, *, important: Option) -> "Tensor":
    """The paper's loop over a list of tokens, most salient first.

    The authors' code stops with an error where the list is odd, or where a round would remove more than every other
    token. Here the last token of an odd list is one of those that may be removed, and a round removes what it can.
    """
    import torch

    assert view.visual_saliency is not None and view.visual_features is not None
    rows = torch.where(view.is_visual)[0]
    saliency = view.visual_saliency[rows]
    order = torch.where(saliency.isnan(), -torch.inf, saliency).argsort(descending=True, stable=True)
    num_important = int(view.num_keep * _fraction(important))
    salient, left = order[:num_important], order[num_important:]
    features = view.visual_features[rows]
    unit = torch.nn.functional.normalize(features.nan_to_num(), dim=-1)
    norms = torch.linalg.vector_norm(features, dim=-1)
    no_direction = ~((norms > 0) & (norms < torch.inf))
    unit[no_direction] = 0
    num_diverse = view.num_keep - num_important
    while len(left) > num_diverse:
        removable, partners = left[0::2], left[1::2]
        likeness = torch.cat([unit[removable] @ unit[partners].T, torch.full((len(removable), 1), -2.0)], dim=1)
        likeness = likeness.amax(dim=1).masked_fill(no_direction[removable], 2)
        by_likeness = removable[likeness.argsort(descending=True, stable=True)]
        left = torch.cat([by_likeness[min(_PER_ROUND, len(left) - num_diverse) :], partners])
    scores = torch.zeros(len(view.is_visual))
    scores[rows[torch.cat([salient, left])]] = torch.arange(view.num_keep, 0, -1.0)
    return scores


def _fraction(important: Option) -> Fraction:
    """The decimals as written, 29/100 and not the nearest binary number, so that whole tokens come out exactly."""
    return Fraction(str(important)).limit_denominator(10**9)


def flops(size: Size) -> int:
    """T^2 (2 D + 2 R), R = (N - num_keep) / 8 + 2 rounds, cubic in all.

    That is the cosine of every two tokens, for features as wide as the hidden states; then in every round the nearest
    of each token, and its rank, each among all others.
    """
    rounds = -(-(size.visual - size.keep) // _PER_ROUND) + _EXTRA_ROUNDS
    return size.tokens**2 * 2 * (size.dims.hidden_size + rounds)


SELECTOR = Selector(
    score=score,
    reference=reference,
    flops=flops,
    place="input",
    graded=False,
    reads=("visual_saliency", "visual_features"),
    # Share of the tokens that stay for their saliency, rounded down to whole tokens.
    options={"important": Setting(0.5, most=1)},
)
