"""CAPA without its values: the attention of the last prompt token, the mean over heads, at the same layer and k."""

from typing import TYPE_CHECKING

from capa_export.selectors.selector import Function, GraphView, NodeWriter, Selector, Size, TensorView
from capa_export.selectors.text import last_attention

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import Tensor

__all__ = ["SELECTOR"]


_FUNCTION = Function("""
MeanOverHeads (attention) => (amounts) {
    heads = Constant <value_ints = [0, 1, 2]> ()
    amounts = ReduceMean <keepdims = 0> (attention, heads)
}
""")


def score(op: NodeWriter, view: GraphView) -> "ir.Value":
    """The mean over heads of softmax(q k)."""
    return op.scores(_FUNCTION, view.text_rows_X, last_attention(op, view))


def reference(view: TensorView) -> "Tensor":
    """The mean over heads of the model's own probabilities."""
    assert view.attention is not None
    return view.attention.mean(0)


def flops(size: Size) -> int:
    """The last query's row of QK^T."""
    return 2 * size.tokens * size.dims.num_heads * size.dims.head_dim


SELECTOR = Selector(
    score=score,
    reference=reference,
    flops=flops,
    place="attention",
)
