"""Maximal marginal relevance in chunks, for selectors that weigh a token's magnitude against its nearest chosen one."""

from typing import TYPE_CHECKING

from capa_export.selectors.selector import Function, GraphView, NodeWriter, Option, Setting, Size, TensorView
from capa_export.selectors.text import DESCENDING_RANK, TOKEN_KINDS

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import Tensor

__all__ = ["OPTIONS", "choose", "choose_eagerly", "flops_of_choice"]

OPTIONS: dict[str, Setting] = {"balance": Setting(0.5, most=1), "chunks": Setting(8, 1, 64, whole=True)}
"""Weight of magnitude against similarity, and number of steps: as many as tokens to keep make it plain MMR. Each step
adds nodes of its own."""

_SHARES = Function("""
Shares (magnitude, is_visual) => (share, none_chosen) {
    is_nan_T = IsNaN (magnitude)
    is_text_T = Not (is_visual)
    is_ignored_T = Or (is_nan_T, is_text_T)
    zero = Constant <value_float = 0.0> ()
    seen_T = Where (is_ignored_T, zero, magnitude)
    first_axis = Constant <value_ints = [0]> ()
    largest = ReduceMax (seen_T, first_axis)
    smallest = Constant <value_float = 1.17549435e-38> ()
    divisor = Max (largest, smallest)
    share = Div (magnitude, divisor)
    shape = Shape (magnitude)
    none_chosen = Expand (zero, shape)
}
""")

_VALUES = Function("""
MarginalValues <balance> (share, similarity, is_visual, chosen) => (values, candidates) {
    zero = Constant <value_float = 0.0> ()
    first_axis = Constant <value_ints = [0]> ()
    second_axis = Constant <value_ints = [1]> ()
    is_chosen_T = Greater (chosen, zero)
    is_open_T = Not (is_chosen_T)
    candidates = And (is_open_T, is_visual)
    # The similarity to the nearest of those chosen, at least -1; nothing as long as there is none.
    chosen_1T = Unsqueeze (is_chosen_T, first_axis)
    least = Constant <value_float = -1.0> ()
    known_TT = Where (chosen_1T, similarity, least)
    nearest_T = ReduceMax <keepdims = 0> (known_TT, second_axis)
    best = ReduceMax (chosen, first_axis)
    is_any = Greater (best, zero)
    penalty_T = Where (is_any, nearest_T, zero)
    one = Constant <value_float = 1.0> ()
    weight = Constant <value_float: float = @balance> ()
    other_weight = Sub (one, weight)
    gain_T = Mul (weight, share)
    loss_T = Mul (other_weight, penalty_T)
    values = Sub (gain_T, loss_T)
}
""")

_TAKE = Function("""
TakeChunk <steps_left> (ranks, num_keep, chosen) => (amounts) {
    # An equal part of what is left to choose, rounded up.
    zero = Constant <value_float = 0.0> ()
    is_chosen_T = Greater (chosen, zero)
    count_T = Cast <to = 7> (is_chosen_T)
    first_axis = Constant <value_ints = [0]> ()
    num_chosen = ReduceSum (count_T, first_axis)
    rest = Sub (num_keep, num_chosen)
    one = Constant <value_int = 1> ()
    parts = Constant <value_int: int = @steps_left> ()
    rest_and_parts = Add (rest, parts)
    almost = Sub (rest_and_parts, one)
    part = Div (almost, parts)
    limit = Cast <to = 1> (part)
    is_taken_T = Less (ranks, limit)
    rest_number = Cast <to = 1> (rest)
    amount_T = Sub (rest_number, ranks)
    amounts = Where (is_taken_T, amount_T, chosen)
}
""")


def choose(
    op: NodeWriter,
    view: GraphView,
    magnitude_T: "ir.Value",
    similarity_TT: "ir.Value",
    *,
    balance: Option,
    chunks: Option,
) -> "ir.Value":
    """Add nodes that choose `num_keep` tokens by balance * magnitude / largest - (1 - balance) * nearest similarity.

    Args:
        op: Where the nodes go.
        view: What is scored.
        magnitude_T: [T] FP32, at least 0; NaN never wins.
        similarity_TT: [T, T] FP32 in [-1, 1], no NaN.
        balance: As in `OPTIONS`.
        chunks: As in `OPTIONS`.

    Returns:
        The scores of a selector that is not graded.
    """
    is_visual_T, _ = op.apply(TOKEN_KINDS, view.hidden_TD, view.text_rows_X)
    share_T, chosen_T = op.apply(_SHARES, magnitude_T, is_visual_T)
    weight = float(balance)

    def ranks(chosen_T: "ir.Value") -> "ir.Value":
        values = op.apply(_VALUES, share_T, similarity_TT, is_visual_T, chosen_T, balance=weight)
        return op.apply(DESCENDING_RANK, *values)[0]

    for steps_left in range(int(chunks), 1, -1):
        (chosen_T,) = op.apply(_TAKE, ranks(chosen_T), view.num_keep, chosen_T, steps_left=steps_left)
    return op.scores(_TAKE, view.text_rows_X, ranks(chosen_T), view.num_keep, chosen_T, steps_left=1)


def choose_eagerly(
    view: TensorView, magnitude: "Tensor", similarity: "Tensor", *, balance: Option, chunks: Option
) -> "Tensor":
    """Choose tokens as the nodes of `choose` do, on lists of rows; returns scores [T]."""
    import torch

    shares = magnitude / magnitude[view.is_visual].nan_to_num(0).max().clamp_min(torch.finfo(torch.float32).tiny)
    weight = float(balance)
    left = torch.where(view.is_visual)[0]
    rows = left[:0]
    for steps_left in range(int(chunks), 0, -1):
        size = -((len(rows) - view.num_keep) // steps_left)
        nearest = similarity[left][:, rows].amax(1) if len(rows) else torch.zeros(len(left))
        value = weight * shares[left] - (1 - weight) * nearest
        order = torch.sort(value.nan_to_num(-torch.inf), descending=True, stable=True).indices
        rows = torch.cat([rows, left[order[:size]]])
        left = left[order[size:]].sort().values
    amounts = torch.zeros(len(view.is_visual))
    amounts[rows] = torch.arange(view.num_keep, 0, -1, dtype=torch.float32)
    return amounts


def flops_of_choice(size: Size) -> int:
    """2 C T^2 in C chunks: each chunk finds every token's nearest chosen token and its rank among all others."""
    return 2 * int(size.options["chunks"]) * size.tokens**2
