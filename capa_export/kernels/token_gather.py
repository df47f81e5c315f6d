"""TokenGather: the kept rows of all that a layer holds for its tokens, in one launch.

B = batch, T = tokens, K = tokens kept, D = hidden size, G = KV heads, d = head size, r = size of a rotary table's row.
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

# 128 columns are one head of most models, read in whole lines. 16 rows make two loads of 16 bytes to a thread and
# tensor: enough in flight with several programs on an SM, where 32 rows spill.
_ROWS, _COLUMNS = 16, 128


def reference(
    hidden: "torch.Tensor",
    key: "torch.Tensor",
    value: "torch.Tensor",
    cos: "torch.Tensor",
    sin: "torch.Tensor",
    kept: "torch.Tensor",
) -> "tuple[torch.Tensor, ...]":
    """What the kernel computes.

    Args:
        hidden: [B, T, D], fp16, bf16 or fp32, as the next four.
        key: [B, G, T, d].
        value: [B, G, T, d].
        cos: [B, T, r].
        sin: [B, T, r].
        kept: [B, K], positions.

    Returns:
        The first five with K for T, bit by bit.
    """
    import torch

    batch = torch.arange(len(kept), device=kept.device)[:, None]
    heads = tuple(x.transpose(1, 2)[batch, kept].transpose(1, 2) for x in (key, value))
    return (hidden[batch, kept], *heads, cos[batch, kept], sin[batch, kept])


@triton.jit
def gather_rows(
    hidden,
    key,
    value,
    cos,
    sin,
    kept,
    hidden_kept,
    key_kept,
    value_kept,
    cos_kept,
    sin_kept,
    num_tokens,
    num_kept,
    hidden_size,
    kv_heads,
    head_size,
    rotary_size,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.load(kept + batch * num_kept + row, mask=row < num_kept, other=0)[:, None]
    # TensorRT may time a plugin on positions that it makes up.
    inside = (row < num_kept)[:, None] & (token >= 0) & (token < num_tokens)
    row = row[:, None]
    # The first programs take a head of keys and values each, the next the rotary tables, the others hidden columns.
    part = tl.program_id(1)
    if part < kv_heads:
        head = batch * kv_heads + part
        for start in range(0, head_size, COLUMNS):
            column = start + tl.arange(0, COLUMNS)[None, :]
            mask = inside & (column < head_size)
            source = (head * num_tokens + token) * head_size + column
            target = (head * num_kept + row) * head_size + column
            tl.store(key_kept + target, tl.load(key + source, mask=mask), mask=mask)
            tl.store(value_kept + target, tl.load(value + source, mask=mask), mask=mask)
    elif part == kv_heads:
        for start in range(0, rotary_size, COLUMNS):
            column = start + tl.arange(0, COLUMNS)[None, :]
            mask = inside & (column < rotary_size)
            source = (batch * num_tokens + token) * rotary_size + column
            target = (batch * num_kept + row) * rotary_size + column
            tl.store(cos_kept + target, tl.load(cos + source, mask=mask), mask=mask)
            tl.store(sin_kept + target, tl.load(sin + source, mask=mask), mask=mask)
    else:
        column = (part - kv_heads - 1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        mask = inside & (column < hidden_size)
        source = (batch * num_tokens + token) * hidden_size + column
        target = (batch * num_kept + row) * hidden_size + column
        tl.store(hidden_kept + target, tl.load(hidden + source, mask=mask), mask=mask)


def _launches(size: Any) -> list[Launch]:
    return [
        Launch(
            kernel=gather_rows,
            grid=(ceil_div(size.kept, _ROWS), size.kv_heads + 1 + ceil_div(size.hidden_size, _COLUMNS), size.batch),
            args=(
                *OPERATOR.inputs,
                *OPERATOR.outputs,
                size.tokens,
                size.kept,
                size.hidden_size,
                size.kv_heads,
                size.head_size,
                size.rotary_size,
            ),
            constants={"ROWS": _ROWS, "COLUMNS": _COLUMNS},
        )
    ]


def _cost(size: Any) -> Cost:
    """Reads the kept rows and their positions, writes the rows."""
    row = size.hidden_size + 2 * size.kv_heads * size.head_size + 2 * size.rotary_size
    return Cost(bytes=size.batch * size.kept * (2 * 2 * row + 8), flops=0)


OPERATOR = Operator(
    name="TokenGather",
    inputs={
        "hidden": Tensor("real", ("batch", "tokens", "hidden_size")),
        "key": Tensor("real", ("batch", "kv_heads", "tokens", "head_size"), has_batch=True),
        "value": Tensor("real", ("batch", "kv_heads", "tokens", "head_size"), has_batch=True),
        "cos": Tensor("real", ("batch", "tokens", "rotary_size"), has_batch=True),
        "sin": Tensor("real", ("batch", "tokens", "rotary_size"), has_batch=True),
        "kept": Tensor("int64", ("batch", "kept")),
    },
    outputs={
        "hidden_kept": Tensor("real", ("batch", "kept", "hidden_size")),
        "key_kept": Tensor("real", ("batch", "kv_heads", "kept", "head_size"), has_batch=True),
        "value_kept": Tensor("real", ("batch", "kv_heads", "kept", "head_size"), has_batch=True),
        "cos_kept": Tensor("real", ("batch", "kept", "rotary_size"), has_batch=True),
        "sin_kept": Tensor("real", ("batch", "kept", "rotary_size"), has_batch=True),
    },
    attributes={},
    launches=_launches,
    cost=_cost,
    aligned_sizes=("hidden_size", "head_size"),
)
