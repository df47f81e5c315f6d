"""FEATHER (arXiv 2412.13180): attention without rotary positions, and an even grid of tokens whatever their attention.

The authors run two stages of 32 layers: at layer 8 the best 30 % join the grid, about 38 % together; at layer 16 the
best 9 % of those stay, by attention alone:

    schedule = [
        { layer = 8, ratio = 0.62, selector = "feather" },
        { layer = 16, ratio = 0.966, selector = "feather", options = { grid = 0 } },
    ]

Ours is that the grid counts towards a fixed number of tokens: it comes first, then the best of the rest, which is their
union where the number is the union's.
"""

from typing import TYPE_CHECKING

from capa_export.selectors.selector import Function, GraphView, NodeWriter, Option, Selector, Setting, Size, TensorView
from capa_export.selectors.text import LAST_LOGITS

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import Tensor

__all__ = ["SELECTOR"]


_ATTENTION = Function("""
PlainAttentionScore (logits, text_rows) => (amounts) {
    # Text takes no share.
    num_tokens = Shape <start = 3, end = 4> (logits)
    seen = Constant <value_float = 0.0> ()
    seen_T = Expand (seen, num_tokens)
    hidden = Constant <value = float {-inf}> ()
    text_shape = Shape (text_rows)
    hidden_X = Expand (hidden, text_shape)
    mask_T = ScatterElements <axis = 0> (seen_T, text_rows, hidden_X)
    masked_1GrT = Add (logits, mask_T)
    attention_1GrT = Softmax <axis = -1> (masked_1GrT)
    heads = Constant <value_ints = [0, 1, 2]> ()
    amounts = ReduceMean <keepdims = 0> (attention_1GrT, heads)
}
""")

_GRID = Function("""
GridFirst <stride> (attention, grid) => (amounts) {
    # Attention is at most 1. On the grid it is at least the smallest normal number, and a power of two, which keeps
    # relative leads exact, lifts that to 2: NaN stays NaN.
    step = Constant <value_int: int = @stride> ()
    quotient_2T = Div (grid, step)
    multiple_2T = Mul (quotient_2T, step)
    remainder_2T = Sub (grid, multiple_2T)
    first_axis = Constant <value_ints = [0]> ()
    distance_T = ReduceSum <keepdims = 0> (remainder_2T, first_axis)
    zero = Constant <value_int = 0> ()
    on_grid_T = Equal (distance_T, zero)
    smallest = Constant <value_float = 1.17549435e-38> ()
    too_small_T = Less (attention, smallest)
    normal_T = Where (too_small_T, smallest, attention)
    lift = Constant <value_float = 1.70141183e38> ()
    lifted_T = Mul (normal_T, lift)
    amounts = Where (on_grid_T, lifted_T, attention)
}
""")


def score(op: NodeWriter, view: GraphView, *, stride: Option, grid: Option) -> "ir.Value":
    """The mean over heads of softmax(q k) over visual keys, q and k not rotated; 2^127 times that on the grid."""
    assert view.plain_query is not None and view.plain_key is not None and view.visual_grid is not None
    (logits,) = op.apply(LAST_LOGITS, view.plain_query, view.plain_key, scale=view.scale)
    if not grid:
        return op.scores(_ATTENTION, view.text_rows_X, logits, view.text_rows_X)
    (attention_T,) = op.apply(_ATTENTION, logits, view.text_rows_X)
    return op.scores(_GRID, view.text_rows_X, attention_T, view.visual_grid, stride=int(stride))


def reference(view: TensorView, *, stride: Option, grid: Option) -> "Tensor":
    """The mean of each head's attention, head by head."""
    import torch

    assert view.plain_query is not None and view.plain_key is not None and view.visual_grid is not None
    heads, head_size = view.plain_query.shape
    visual_rows = torch.where(view.is_visual)[0]
    attention = torch.zeros(len(view.is_visual))
    for head, query in enumerate(view.plain_query):
        key = view.plain_key[head * len(view.plain_key) // heads]
        attention[visual_rows] += torch.softmax(key[visual_rows] @ query * head_size**-0.5, 0) / heads
    if not grid:
        return attention
    row, column = view.visual_grid
    step = int(stride)
    on_grid = (row % step == 0) & (column % step == 0)
    return torch.where(on_grid, torch.fmax(attention, torch.tensor(2.0**-126)) * 2.0**127, attention)


def flops(size: Size) -> int:
    """The last query's row of QK^T."""
    return 2 * size.tokens * size.dims.num_heads * size.dims.head_dim


SELECTOR = Selector(
    score=score,
    reference=reference,
    flops=flops,
    place="entry",
    reads=("visual_grid",),
    # Distance of the grid's rows and columns, and whether there is a grid.
    options={"stride": Setting(3, 1, whole=True), "grid": Setting(1, 0, 1, whole=True)},
)
