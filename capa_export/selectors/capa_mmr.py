"""CAPA with diversity: contributions as magnitudes, less of those that say what a chosen token already says. Ours."""

from typing import TYPE_CHECKING

from capa_export.selectors import _mmr, capa
from capa_export.selectors.selector import Function, GraphView, NodeWriter, Option, Selector, Setting, Size, TensorView
from capa_export.selectors.text import UNIT_ROWS, last_attention

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import Tensor

__all__ = ["SELECTOR"]


_DIRECTION = Function("""
ContributionDirection (attention, value, output_weight) => (direction) {
    # concat_h(a_h * v_g(h)) W_O (CAPA, eq. 2), scaled, as squares of small ones would be zero.
    value_1GTd = Cast <to = 1> (value)
    weight_DHd = Cast <to = 1> (output_weight)
    attention_TGr1 = Transpose <perm = [3, 1, 2, 0]> (attention)
    value_TG1d = Transpose <perm = [2, 1, 0, 3]> (value_1GTd)
    weighted_TGrd = Mul (attention_TGr1, value_TG1d)
    num_tokens = Shape <start = 2, end = 3> (value)
    rest = Constant <value_ints = [-1]> ()
    rows = Concat <axis = 0> (num_tokens, rest)
    weighted_THd = Reshape (weighted_TGrd, rows)
    written_TD = Gemm <transB = 1> (weighted_THd, weight_DHd)
    size_TD = Abs (written_TD)
    largest_T1 = ReduceMax (size_TD, rest)
    zero = Constant <value_float = 0.0> ()
    one = Constant <value_float = 1.0> ()
    is_more_T1 = Greater (largest_T1, zero)
    divisor_T1 = Where (is_more_T1, largest_T1, one)
    direction = Div (written_TD, divisor_T1)
}
""")

_SIMILARITY = Function("""
LikenessToRows (unit, is_usable) => (similarity) {
    # What points nowhere adds nothing to any choice.
    cosine_TT = Gemm <transB = 1> (unit, unit)
    second_axis = Constant <value_ints = [1]> ()
    is_usable_T1 = Unsqueeze (is_usable, second_axis)
    one = Constant <value_float = 1.0> ()
    similarity = Where (is_usable_T1, cosine_TT, one)
}
""")


def score(op: NodeWriter, view: GraphView, *, balance: Option, chunks: Option, hidden: Option) -> "ir.Value":
    """Chunked MMR of CAPA's scores and the cosines between contributions, or hidden states."""
    assert view.value is not None and view.output_weight is not None
    features_TD = view.hidden_TD
    if not hidden:
        (features_TD,) = op.apply(_DIRECTION, last_attention(op, view), view.value, view.output_weight)
    (similarity_TT,) = op.apply(_SIMILARITY, *op.apply(UNIT_ROWS, features_TD))
    return _mmr.choose(op, view, capa.score(op, view), similarity_TT, balance=balance, chunks=chunks)


def reference(view: TensorView, *, balance: Option, chunks: Option, hidden: Option) -> "Tensor":
    """Compute magnitudes and cosines from the contributions themselves, head by head."""
    import torch

    assert view.attention is not None and view.value is not None and view.output_weight is not None
    heads, head_size = len(view.attention), view.value.shape[-1]
    value_HTd = view.value.repeat_interleave(heads // len(view.value), dim=0)
    output_HDd = view.output_weight.unflatten(1, (heads, head_size)).movedim(1, 0)
    written_TD = torch.einsum("ht,htd,hnd->tn", view.attention, value_HTd, output_HDd)
    # In FP64, where squares of small contributions are not zero.
    features_TD = (view.hidden if hidden else written_TD).double()
    norm_T = features_TD.norm(dim=-1)
    unit_TD = features_TD / norm_T[:, None]
    similarity_TT = (unit_TD @ unit_TD.T).float().nan_to_num(0)
    similarity_TT[~((norm_T > 0) & norm_T.isfinite())] = 1
    return _mmr.choose_eagerly(view, written_TD.norm(dim=-1), similarity_TT, balance=balance, chunks=chunks)


def flops(size: Size) -> int:
    """CAPA's score, the contributions once more where likeness is theirs, the cosines and the choice."""
    written = capa.flops(size) * (1 if size.options["hidden"] else 2)
    return written + 2 * size.tokens**2 * size.dims.hidden_size + _mmr.flops_of_choice(size)


SELECTOR = Selector(
    score=score,
    reference=reference,
    flops=flops,
    place="attention",
    graded=False,
    # As in `_mmr`, and whether hidden states rather than contributions say which tokens are alike.
    options={**_mmr.OPTIONS, "hidden": Setting(0, 0, 1, whole=True)},
)
