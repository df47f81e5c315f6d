"""DART (arXiv 2502.11494): a few pivots, and for each pivot the tokens that are least like it."""

from typing import TYPE_CHECKING

from capa_export.selectors.selector import Function, GraphView, NodeWriter, Option, Selector, Setting, Size, TensorView
from capa_export.selectors.text import DESCENDING_RANK, RANK_SCORES, TOKEN_KINDS, UNIT_ROWS

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import Tensor

__all__ = ["SELECTOR"]


_SIZES = Function("""
DartSizes (hidden, is_usable) => (sizes) {
    hidden_TD = Cast <to = 1> (hidden)
    last_axis = Constant <value_ints = [1]> ()
    norm_T = ReduceL1 <keepdims = 0> (hidden_TD, last_axis)
    last = Constant <value_float = -1.0> ()
    sizes = Where (is_usable, norm_T, last)
}
""")

_PIVOTS = Function("""
DartPivots <visual_pivots, text_pivots>
    (unit, is_usable, visual_ranks, question_ranks, is_visual, is_question, num_keep)
    => (unlikeness, quotas, places, order) {
    # P pivots, the visual ones first. A text pivot that there is none of has the quota 0.
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    first_axis = Constant <value_ints = [0]> ()
    second_axis = Constant <value_ints = [1]> ()
    most_visual = Constant <value_int: int = @visual_pivots> ()
    most_text = Constant <value_int: int = @text_pivots> ()
    most = Add (most_visual, most_text)
    pivot_P = Range (zero, most, one)
    most_visual_float = Cast <to = 1> (most_visual)
    question_slot_T = Add (question_ranks, most_visual_float)
    no_slot = Constant <value_float = -1.0> ()
    question_or_none_T = Where (is_question, question_slot_T, no_slot)
    is_first_T = Less (visual_ranks, most_visual_float)
    is_visual_pivot_T = And (is_first_T, is_visual)
    slot_T = Where (is_visual_pivot_T, visual_ranks, question_or_none_T)
    slot_1T = Unsqueeze (slot_T, first_axis)
    pivot_float_P = Cast <to = 1> (pivot_P)
    pivot_P1 = Unsqueeze (pivot_float_P, second_axis)
    is_pivot_PT = Equal (pivot_P1, slot_1T)
    is_pivot_float_PT = Cast <to = 1> (is_pivot_PT)
    pivots_PD = MatMul (is_pivot_float_PT, unit)
    unit_DT = Transpose <perm = [1, 0]> (unit)
    cosine_PT = MatMul (pivots_PD, unit_DT)
    unlikeness_PT = Neg (cosine_PT)
    is_usable_1T = Unsqueeze (is_usable, first_axis)
    last = Constant <value_float = -2.0> ()
    unlikeness = Where (is_usable_1T, unlikeness_PT, last)
    question_count_T = Cast <to = 7> (is_question)
    num_questions = ReduceSum <keepdims = 1> (question_count_T, first_axis)
    num_visual = Min (num_keep, most_visual)
    num_text = Min (num_questions, most_text)
    # One at least: without a picture there are none to share among.
    some = Constant <value_ints = [1]> ()
    all_pivots = Add (num_visual, num_text)
    num_pivots = Max (all_pivots, some)
    remaining = Sub (num_keep, num_visual)
    each = Div (remaining, num_pivots)
    shared_out = Mul (each, num_pivots)
    left_over = Sub (remaining, shared_out)
    gets_one_more_P = Less (pivot_P, left_over)
    one_more_P = Cast <to = 7> (gets_one_more_P)
    quota_P = Add (one_more_P, each)
    is_there_P = Less (pivot_P, num_pivots)
    quota_or_none_P = Where (is_there_P, quota_P, zero)
    quotas = Cast <to = 1> (quota_or_none_P)
    by_earlier_P = Mul (pivot_P, each)
    extra_by_earlier_P = Min (pivot_P, left_over)
    taken_before_P = Add (by_earlier_P, extra_by_earlier_P)
    place_P = Add (taken_before_P, num_visual)
    places = Cast <to = 1> (place_P)
    free = Constant <value = float {inf}> ()
    order = Where (is_visual_pivot_T, visual_ranks, free)
}
""")

_POOL = Function("""
DartPool <pivot> (unlikeness, is_visual, order) => (amounts, pool) {
    first_axis = Constant <value_ints = [0]> ()
    index = Constant <value_int: int = @pivot> ()
    amounts = Gather <axis = 0> (unlikeness, index)
    is_free_T = IsInf (order)
    pool = And (is_free_T, is_visual)
}
""")

_TAKE = Function("""
DartTake <pivot> (ranks, pool, quotas, places, order) => (next_order) {
    index = Constant <value_int: int = @pivot> ()
    quota = Gather <axis = 0> (quotas, index)
    place = Gather <axis = 0> (places, index)
    is_within_T = Less (ranks, quota)
    is_taken_T = And (is_within_T, pool)
    placed_T = Add (ranks, place)
    next_order = Where (is_taken_T, placed_T, order)
}
""")


def score(op: NodeWriter, view: GraphView, *, visual_pivots: Option, text_pivots: Option) -> "ir.Value":
    """Ranks: the visual pivots by L1 norm, then what each pivot takes, least like it first."""
    num_visual, num_text = _counts(visual_pivots, text_pivots)
    is_visual, is_question = op.apply(TOKEN_KINDS, view.hidden_TD, view.text_rows_X)
    unit, is_usable = op.apply(UNIT_ROWS, view.hidden_TD)
    (sizes,) = op.apply(_SIZES, view.hidden_TD, is_usable)
    (visual_ranks,) = op.apply(DESCENDING_RANK, sizes, is_visual)
    (question_ranks,) = op.apply(DESCENDING_RANK, sizes, is_question)
    unlikeness, quotas, places, order = op.apply(
        _PIVOTS,
        *(unit, is_usable, visual_ranks, question_ranks, is_visual, is_question, view.num_keep),
        visual_pivots=num_visual,
        text_pivots=num_text,
    )
    for pivot in range(num_visual + num_text):
        amounts, pool = op.apply(_POOL, unlikeness, is_visual, order, pivot=pivot)
        (ranks,) = op.apply(DESCENDING_RANK, amounts, pool)
        (order,) = op.apply(_TAKE, ranks, pool, quotas, places, order, pivot=pivot)
    return op.scores(RANK_SCORES, view.text_rows_X, order, view.num_keep)


def reference(view: TensorView, *, visual_pivots: Option, text_pivots: Option) -> "Tensor":
    """Pivot by pivot, visual ones first and the largest first.

    The visual pivots stay and all pivots share what is left to choose, the first few one more where it is uneven, so
    that as many stay as were asked for; the authors' code keeps the pivots on top and rounds down.
    """
    import torch

    num_visual, num_text = _counts(visual_pivots, text_pivots)
    rows: list[int] = torch.where(view.is_visual)[0].tolist()
    questions = [row for row in range(rows[0], len(view.hidden)) if not view.is_visual[row]]
    has_direction = view.hidden.isfinite().all(dim=1) & view.hidden.any(dim=1)
    hidden = view.hidden.masked_fill(~has_direction[:, None], 0)
    size: list[float] = hidden.abs().sum(dim=1).tolist()
    pivots = sorted(rows, key=lambda row: -size[row])[: min(num_visual, view.num_keep)]
    kept, pool = list(pivots), [row for row in rows if row not in pivots]
    pivots += sorted(questions, key=lambda row: -size[row])[:num_text]
    each, left_over = divmod(view.num_keep - len(kept), len(pivots))
    for index, pivot in enumerate(pivots):
        cosine = torch.cosine_similarity(hidden, hidden[pivot], dim=-1).masked_fill(~has_direction, 2)
        likeness: list[float] = cosine.tolist()
        taken = sorted(pool, key=lambda row: likeness[row])[: each + (index < left_over)]
        kept += taken
        pool = [row for row in pool if row not in taken]
    scores = torch.zeros(len(view.is_visual))
    scores[kept] = torch.arange(view.num_keep, 0, -1.0)
    return scores


def _counts(visual_pivots: Option, text_pivots: Option) -> tuple[int, int]:
    return int(visual_pivots), int(text_pivots)


def flops(size: Size) -> int:
    """(2 + 4 P) T D + (2 + P) T^2 of P pivots: norms, pivots gathered by a product, cosines; ranks of them all."""
    num_pivots = sum(_counts(**size.options))
    return size.tokens * size.dims.hidden_size * (2 + 4 * num_pivots) + (2 + num_pivots) * size.tokens**2


SELECTOR = Selector(
    score=score,
    reference=reference,
    flops=flops,
    place="input",
    graded=False,
    # Which all stay.
    least="visual_pivots",
    # Pivots of either kind: of text, at most as many as stand behind the first visual token. Each is nodes of its own.
    options={
        "visual_pivots": Setting(4, 1, 64, whole=True),
        "text_pivots": Setting(4, 0, 64, whole=True),
    },
)
