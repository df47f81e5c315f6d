"""VisualScale: x * scale where a visual token stands, the given rows where text stands, in one pass.

B = batch, T = tokens, D = hidden size, X = text tokens.
"""

# Triton's language is untyped, and a kernel's arguments are pointers and numbers.
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from capa_export.kernels.operator import Cost, Launch, Operator, Tensor, ceil_div

if TYPE_CHECKING:
    import torch

__all__ = ["OPERATOR", "reference"]

_ROWS, _COLUMNS, _TEXT = 4, 1024, 64


def reference(
    x: "torch.Tensor", scale: "torch.Tensor", text: "torch.Tensor", text_rows: "torch.Tensor"
) -> "torch.Tensor":
    """What the kernel computes.

    Args:
        x: [B, T, D], fp16, bf16 or fp32.
        scale: [D].
        text: [B, X, D], the rows of text.
        text_rows: [B, X], where they stand; ascending, and -1 behind the last of a prompt with fewer.

    Returns:
        [B, T, D], rounded once from the product in FP32.
    """
    y = (x.float() * scale.float()).to(x.dtype)
    for row, rows, values in zip(y, text_rows, text, strict=True):
        row[rows[rows >= 0]] = values[rows >= 0]
    return y


@triton.jit
def merge_rows(
    x,
    scale,
    text,
    text_rows,
    y,
    num_tokens,
    hidden_size,
    num_text,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TEXT: tl.constexpr,
):
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    # Which row of `text` belongs here, if any: a prompt has few of them, and they stay in the cache.
    source = tl.full([ROWS], -1, tl.int32)
    for start in range(0, num_text, TEXT):
        index = start + tl.arange(0, TEXT)
        position = tl.load(text_rows + batch * num_text + index, mask=index < num_text, other=-1)
        found = tl.where(position[None, :] == row[:, None], index[None, :], -1)
        source = tl.maximum(source, tl.max(found, axis=1))
    is_text = source >= 0
    inside = (row < num_tokens)[:, None] & (column < hidden_size)[None, :]
    at = (batch * num_tokens + row[:, None]) * hidden_size + column[None, :]
    factor = tl.load(scale + column, mask=column < hidden_size, other=0).to(tl.float32)
    scaled = tl.load(x + at, mask=inside & ~is_text[:, None], other=0).to(tl.float32) * factor[None, :]
    text_at = (batch * num_text + source[:, None]) * hidden_size + column[None, :]
    given = tl.load(text + text_at, mask=inside & is_text[:, None], other=0)
    tl.store(y + at, tl.where(is_text[:, None], given, scaled.to(given.dtype)), mask=inside)


def _launches(size: Any) -> list[Launch]:
    return [
        Launch(
            kernel=merge_rows,
            grid=(ceil_div(size.tokens, _ROWS), ceil_div(size.hidden_size, _COLUMNS), size.batch),
            args=("x", "scale", "text", "text_rows", "y", size.tokens, size.hidden_size, size.num_text),
            constants={"ROWS": _ROWS, "COLUMNS": _COLUMNS, "TEXT": _TEXT},
        )
    ]


def _cost(size: Any) -> Cost:
    """Reads visual rows of x and all of text, writes y."""
    visual = size.tokens - size.num_text
    elements = size.batch * size.hidden_size * (visual + size.num_text + size.tokens) + size.hidden_size
    return Cost(bytes=2 * elements + 8 * size.batch * size.num_text, flops=size.batch * visual * size.hidden_size)


OPERATOR = Operator(
    name="VisualScale",
    inputs={
        "x": Tensor("real", ("batch", "tokens", "hidden_size")),
        "scale": Tensor("real", ("hidden_size",)),
        "text": Tensor("real", ("batch", "num_text", "hidden_size")),
        "text_rows": Tensor("int64", ("batch", "num_text")),
    },
    outputs={"y": Tensor("real", ("batch", "tokens", "hidden_size"))},
    attributes={},
    launches=_launches,
    cost=_cost,
    aligned_sizes=("hidden_size",),
)
