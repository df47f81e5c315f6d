"""CAPA without its values: the attention of the last prompt token, the mean over heads, at the same layer and k."""

from typing import TYPE_CHECKING

from capa_export.selectors.selector import GraphView, Place, Prompted, Setting, Size, TensorView
from capa_export.selectors.text import function, last_attention, score_node

if TYPE_CHECKING:
    import onnx_ir as ir
    from onnxscript import OpBuilder
    from torch import Tensor

__all__ = ["GRADED", "LAYER", "LEAST", "OPTIONS", "PLACE", "READS", "flops", "reference", "score"]

PLACE: Place = "attention"
LAYER = None
GRADED = True
READS: tuple[Prompted, ...] = ()
LEAST = 1
OPTIONS: dict[str, Setting] = {}

_FUNCTION = function("""
MeanOverHeads (attention) => (amounts) {
    heads = Constant <value_ints = [0, 1, 2]> ()
    amounts = ReduceMean <keepdims = 0> (attention, heads)
}
""")


def score(op: "OpBuilder", view: GraphView) -> "ir.Value":
    """The mean over heads of softmax(q k)."""
    return score_node(op, _FUNCTION, view.text_rows_X, last_attention(op, view))


def reference(view: TensorView) -> "Tensor":
    """The mean over heads of the model's own probabilities."""
    assert view.attention is not None
    return view.attention.mean(0)


def flops(size: Size) -> int:
    """The last query's row of QK^T."""
    return 2 * size.tokens * size.dims.num_heads * size.dims.head_dim
