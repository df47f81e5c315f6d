"""DivPrune (arXiv 2503.02175), from the paper alone: tokens as far from each other as greedy steps make them."""

from typing import TYPE_CHECKING

from capa_export.selectors.selector import Function, GraphView, NodeWriter, Selector, Size, TensorView
from capa_export.selectors.text import TOKEN_KINDS, UNIT_ROWS

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import Tensor

__all__ = ["SELECTOR"]


_FUNCTION = Function("""
FarthestPoints (unit, is_usable, is_visual, num_keep) => (amounts) {
    # Distance is 1 - cosine, so the farthest token is that whose highest cosine is lowest. One without a direction is
    # nobody's neighbour and comes last; what is taken, or text, never comes.
    last = Constant <value_float = 3.4028234e38> ()
    never = Constant <value = float {inf}> ()
    nobody = Constant <value_float = -2.0> ()
    first_axis = Constant <value_ints = [0]> ()
    second_axis = Constant <value_ints = [1]> ()
    unit_DT = Transpose <perm = [1, 0]> (unit)
    product_TT = MatMul (unit, unit_DT)
    mirrored_TT = Transpose <perm = [1, 0]> (product_TT)
    # Two that are each other's nearest must tie to the last bit.
    cosine_TT = Max (product_TT, mirrored_TT)
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    num_tokens = Size (is_visual)
    index_T = Range (zero, num_tokens, one)
    own_index_T1 = Unsqueeze (index_T, second_axis)
    other_index_1T = Unsqueeze (index_T, first_axis)
    own_TT = Equal (own_index_T1, other_index_1T)
    is_point_T = And (is_visual, is_usable)
    is_no_point_T = Not (is_point_T)
    other_is_no_point_1T = Unsqueeze (is_no_point_T, first_axis)
    no_neighbour_TT = Or (own_TT, other_is_no_point_1T)
    neighbour_TT = Where (no_neighbour_TT, nobody, cosine_TT)
    nearest_T = ReduceMax <keepdims = 0> (neighbour_TT, second_axis)
    outside_T = Where (is_visual, last, never)
    start_T = Where (is_point_T, nearest_T, outside_T)
    start_1T = Unsqueeze (start_T, first_axis)
    start = ArgMin <axis = 1, keepdims = 0> (start_1T)
    is_start_T = Equal (index_T, start)
    start_row_1T = Gather <axis = 0> (cosine_TT, start)
    start_row_T = Squeeze (start_row_1T, first_axis)
    point_row_T = Where (is_point_T, start_row_T, outside_T)
    closest_to_start_T = Where (is_start_T, never, point_row_T)
    best = Cast <to = 1> (num_keep)
    none = Constant <value_float = 0.0> ()
    start_amount_T = Where (is_start_T, best, none)
    one_step = Constant <value_ints = [1]> ()
    one_less = Constant <value_float = 1.0> ()
    second_best = Sub (best, one_less)
    steps_1 = Sub (num_keep, one_step)
    steps = Squeeze (steps_1, first_axis)
    always = Constant <value = bool {1}> ()
    closest, amounts = Loop (steps, always, closest_to_start_T, start_amount_T) <body = farthest (
        int64 i, bool go, float[T] closest_T, float[T] amount_T
    ) => (bool go_on, float[T] next_closest_T, float[T] next_amount_T) {
        go_on = Identity (go)
        closest_1T = Unsqueeze (closest_T, first_axis)
        chosen = ArgMin <axis = 1, keepdims = 0> (closest_1T)
        is_chosen_T = Equal (index_T, chosen)
        steps_so_far = Cast <to = 1> (i)
        amount = Sub (second_best, steps_so_far)
        next_amount_T = Where (is_chosen_T, amount, amount_T)
        row_1T = Gather <axis = 0> (cosine_TT, chosen)
        row_T = Squeeze (row_1T, first_axis)
        closer_T = Max (closest_T, row_T)
        next_closest_T = Where (is_chosen_T, never, closer_T)
    }>
}
""")


def score(op: NodeWriter, view: GraphView) -> "ir.Value":
    """Ranks by farthest-point steps, one after the other, over the cosines of the projected visual tokens."""
    is_visual, _ = op.apply(TOKEN_KINDS, view.hidden_TD, view.text_rows_X)
    unit, is_usable = op.apply(UNIT_ROWS, view.hidden_TD)
    return op.scores(_FUNCTION, view.text_rows_X, unit, is_usable, is_visual, view.num_keep)


def reference(view: TensorView) -> "Tensor":
    """First the token with the most distant nearest neighbour, then always the one farthest from all chosen."""
    import torch

    rows = torch.where(view.is_visual)[0]
    norms = torch.linalg.vector_norm(view.hidden[rows], dim=-1)
    is_point = (norms > 0) & (norms < torch.inf)
    points, pointless = rows[is_point], rows[~is_point]
    unit = view.hidden[points] / norms[is_point, None]
    cosine = torch.maximum(unit @ unit.T, (unit @ unit.T).T)
    order: list[int] = []
    while len(order) < min(view.num_keep, len(points)):
        neighbours = cosine[:, order] if order else cosine.clone().fill_diagonal_(-2)
        closest = neighbours.amax(dim=1)
        closest[order] = torch.inf
        order.append(int(closest.argmin()))
    kept = torch.cat([points[order], pointless])[: view.num_keep]
    scores = torch.zeros(len(view.is_visual))
    scores[kept] = torch.arange(view.num_keep, 0, -1.0)
    return scores


def flops(size: Size) -> int:
    """The cosine of every two tokens, and in each step the higher of two for each token."""
    return 2 * size.tokens**2 * size.dims.hidden_size + size.keep * size.tokens


SELECTOR = Selector(
    score=score,
    reference=reference,
    flops=flops,
    place="input",
    graded=False,
)
