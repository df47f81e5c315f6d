"""CAPA (arXiv 2602.00247, eq. 2): what a token's values add to the last prompt token, through all heads."""

from typing import TYPE_CHECKING

from capa_export.selectors.selector import GraphView, NodeWriter, Selector, Size, TensorView

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import Tensor

__all__ = ["SELECTOR"]


def score(op: NodeWriter, view: GraphView) -> "ir.Value":
    """|| sum_h A_h v W_O,h ||_2 of each token; the one score with kernels of its own."""
    assert view.query is not None and view.key is not None and view.value is not None
    assert view.output_weight is not None
    (scores_T,) = op.capa(
        "ContributionScore",
        view.query,
        view.key,
        view.value,
        view.output_weight,
        view.text_rows_X,
        scale=view.scale,
    )
    return scores_T


def reference(view: TensorView) -> "Tensor":
    """The norm of the sum over heads, head by head, as the paper writes it."""
    import torch

    assert view.attention is not None and view.value is not None and view.output_weight is not None
    heads, head_size = len(view.attention), view.value.shape[-1]
    value_HTd = view.value.repeat_interleave(heads // len(view.value), dim=0)
    output_HDd = view.output_weight.split(head_size, dim=1)
    written = [view.attention[h][:, None] * (value_HTd[h] @ output_HDd[h].T) for h in range(heads)]
    return torch.linalg.vector_norm(sum(written), dim=-1)


def flops(size: Size) -> int:
    """The last query's row of QK^T, the weighting of V, and its projection, for every token that enters."""
    width = size.dims.num_heads * size.dims.head_dim
    return size.tokens * (2 * width + width + 2 * width * size.dims.hidden_size)


SELECTOR = Selector(
    score=score,
    reference=reference,
    flops=flops,
    place="attention",
)
