"""Building blocks that every family shares; parameter names equal the checkpoint's.

T = tokens, D = hidden size, H = query heads, G = KV heads, d = head size, F = FFN size. Hidden states are 2-D
[T, D], so that every projection is a Gemm over the [out, in] weights as they are stored.
"""

import onnx_ir as ir
from onnxscript import OpBuilder, nn

from capa_export.graph.functions import parse_function

__all__ = [
    "GatedMLP",
    "LayerNorm",
    "Linear",
    "RMSNorm",
    "attention",
    "class_attention",
    "heads_from_tokens",
    "mean_attention",
    "tokens_from_heads",
]

_MEAN_ATTENTION = parse_function("""
MeanAttention <scale> (query, key) => (weights) {
    query_BHQd = Cast <to = 1> (query)
    key_BHLd = Cast <to = 1> (key)
    scale_factor = Constant <value_float: float = @scale> ()
    scaled_BHQd = Mul (query_BHQd, scale_factor)
    key_BHdL = Transpose <perm = [0, 1, 3, 2]> (key_BHLd)
    logits_BHQL = MatMul (scaled_BHQd, key_BHdL)
    weights_BHQL = Softmax <axis = -1> (logits_BHQL)
    heads_and_queries = Constant <value_ints = [1, 2]> ()
    weights = ReduceMean <keepdims = 0> (weights_BHQL, heads_and_queries)
}
""")


class Linear(nn.Module):
    """y = x W^T + b, with W [out, in] as stored: a Gemm that TensorRT neither transposes nor copies."""

    def __init__(self, in_features: int, out_features: int, dtype: ir.DataType, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter([out_features, in_features], dtype)
        self.bias = nn.Parameter([out_features], dtype) if bias else None

    def forward(self, op: OpBuilder, x_TD: ir.Value) -> ir.Value:
        return op.Gemm(x_TD, self.weight, *([self.bias] if self.bias is not None else []), transB=1)


class RMSNorm(nn.Module):
    """Root-mean-square norm; the operator computes in FP32 whatever the dtype of x."""

    def __init__(self, size: int, epsilon: float, dtype: ir.DataType) -> None:
        super().__init__()
        self.weight = nn.Parameter([size], dtype)
        self.epsilon = epsilon

    def forward(self, op: OpBuilder, x_TD: ir.Value) -> ir.Value:
        return op.RMSNormalization(x_TD, self.weight, axis=-1, epsilon=self.epsilon, stash_type=1)


class LayerNorm(nn.Module):
    """Mean and variance norm; the operator computes them in FP32 whatever the dtype of x."""

    def __init__(self, size: int, epsilon: float, dtype: ir.DataType) -> None:
        super().__init__()
        self.weight = nn.Parameter([size], dtype)
        self.bias = nn.Parameter([size], dtype)
        self.epsilon = epsilon

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        return op.LayerNormalization(x, self.weight, self.bias, axis=-1, epsilon=self.epsilon, stash_type=1)


class GatedMLP(nn.Module):
    """SwiGLU FFN: down(silu(gate(x)) * up(x))."""

    def __init__(self, size: int, inner: int, dtype: ir.DataType, *, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = Linear(size, inner, dtype, bias=bias)
        self.up_proj = Linear(size, inner, dtype, bias=bias)
        self.down_proj = Linear(inner, size, dtype, bias=bias)

    def forward(self, op: OpBuilder, x_TD: ir.Value) -> ir.Value:
        gate_TF = self.gate_proj(op, x_TD)
        silu_TF = op.Mul(gate_TF, op.Sigmoid(gate_TF))
        return self.down_proj(op, op.Mul(silu_TF, self.up_proj(op, x_TD)))


def heads_from_tokens(
    op: OpBuilder, x_TD: ir.Value, num_heads: int, head_size: int, batch: ir.Value | None = None
) -> ir.Value:
    """[B*T, H*d] -> [B, H, T, d], with B from the shape tensor `batch`, or 1."""
    shape = [1, -1, num_heads, head_size] if batch is None else op.Concat(batch, [-1, num_heads, head_size], axis=0)
    return op.Transpose(op.Reshape(x_TD, shape), perm=[0, 2, 1, 3])


def tokens_from_heads(op: OpBuilder, x_BHTd: ir.Value, size: int) -> ir.Value:
    """[B, H, T, d] -> [B*T, H*d]."""
    return op.Reshape(op.Transpose(x_BHTd, perm=[0, 2, 1, 3]), [-1, size])


def attention(
    op: OpBuilder,
    query: ir.Value,
    key: ir.Value,
    value: ir.Value,
    head_size: int,
    *,
    mask: ir.Value | None = None,
    causal: bool = False,
) -> ir.Value:
    """Scaled dot-product attention over [B, H, T, d] and [B, G, L, d]; `mask` is additive.

    The operator's own scale goes half to the queries and half to the keys, and TensorRT would write a second, scaled
    copy of the KV cache for it at every step.
    """
    inputs = (op.Mul(query, head_size**-0.5), key, value)
    return op.Attention(*inputs, *([] if mask is None else [mask]), is_causal=int(causal), scale=1.0)


def mean_attention(op: OpBuilder, query: ir.Value, key: ir.Value, head_size: int) -> ir.Value:
    """What queries [B, H, Q, d] pay to each of the keys [B, H, L, d]: [B, L] FP32, mean over heads and queries."""
    weights_BL = op.call(_MEAN_ATTENTION, query, key, scale=head_size**-0.5)
    assert isinstance(weights_BL, ir.Value)
    weights_BL.dtype = ir.DataType.FLOAT
    return weights_BL


def class_attention(op: OpBuilder, query: ir.Value, key: ir.Value, head_size: int) -> ir.Value:
    """What the first of the tokens [B, H, L, d], the class token, pays to each [B, L] FP32, mean over heads."""
    return mean_attention(op, op.Slice(query, [0], [1], [2]), key, head_size)
