"""TokenEmbedding: what a decode step reads of the token before it, made on the device.

B = batch, V = vocabulary, D = hidden size, A = rows of the position ids, L = rows of the lengths.
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

_COLUMNS = 1024


def reference(
    tokens: "torch.Tensor", table: "torch.Tensor", positions: "torch.Tensor", lengths: "torch.Tensor"
) -> "tuple[torch.Tensor, torch.Tensor, torch.Tensor]":
    """What the kernel computes.

    Args:
        tokens: [B], int64.
        table: [V, D], fp16, bf16 or fp32.
        positions: [A, B], int64, of the step before.
        lengths: [L, B], int64, of the step before.

    Returns:
        The tokens' rows [B, D], bit by bit, and positions and lengths one further, which the kernel changes in place.
    """
    return table[tokens], positions + 1, lengths + 1


@triton.jit
def embed_tokens(
    tokens,
    table,
    positions,
    lengths,
    embeds,
    num_tokens,
    hidden_size,
    num_positions,
    num_lengths,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    batch = tl.num_programs(1)
    token = tl.load(tokens + row)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    mask = column < hidden_size
    # No token, after logits that are no numbers, has no row; nobody reads what comes of it.
    inside = mask & (token >= 0) & (token < num_tokens)
    value = tl.load(table + token * hidden_size + column, mask=inside, other=0)
    tl.store(embeds + row * hidden_size + column, value, mask=mask)
    if tl.program_id(0) == 0:
        for index in range(num_positions):
            at = positions + index * batch + row
            tl.store(at, tl.load(at) + 1)
        for index in range(num_lengths):
            at = lengths + index * batch + row
            tl.store(at, tl.load(at) + 1)


def _launches(size: Any) -> list[Launch]:
    return [
        Launch(
            kernel=embed_tokens,
            grid=(ceil_div(size.hidden_size, _COLUMNS), size.batch, 1),
            args=(*OPERATOR.inputs, "embeds", size.vocabulary, size.hidden_size, size.axes, size.stages),
            constants={"COLUMNS": _COLUMNS},
        )
    ]


def _cost(size: Any) -> Cost:
    """Reads a row of the table for each prompt, and writes it."""
    return Cost(bytes=size.batch * (2 * 2 * size.hidden_size + 8 + 16 * (size.axes + size.stages)), flops=0)


OPERATOR = Operator(
    name="TokenEmbedding",
    inputs={
        "tokens": Tensor("int64", ("batch",)),
        "table": Tensor("real", ("vocabulary", "hidden_size")),
        "positions": Tensor("int64", ("axes", "batch")),
        "lengths": Tensor("int64", ("stages", "batch")),
    },
    outputs={"embeds": Tensor("real", ("batch", "hidden_size"))},
    attributes={},
    launches=_launches,
    cost=_cost,
)
