"""TopKKeep: the positions of the best tokens, ascending, exact for any number of them.

B = batch, T = tokens, K = tokens kept.
"""

# Triton's language is untyped, and a kernel's arguments are pointers and numbers.
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false, reportOperatorIssue=false

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from capa_export.kernels.operator import Cost, Launch, Operator, Scratch, Tensor, ceil_div

if TYPE_CHECKING:
    import torch

__all__ = ["OPERATOR", "reference"]

# A tile of pairs is 32 to a thread, each with a counter in a register; each thread has columns of its own, so that rows
# are summed once, at the end.
_ROWS, _OTHERS = 32, 128
# The search is one program a prompt, bound by latency: 8 tokens to a thread are loads enough in flight, and 20,000 take
# five steps. With 32 warps it spills.
_BLOCK, _SEARCH_WARPS = 4096, 16


def reference(scores: "torch.Tensor", num_keep: "torch.Tensor", min_keep_per_image: int) -> "torch.Tensor":
    """What the kernels compute.

    Args:
        scores: [B, T], FP32; +inf for text, NaN ranks as -inf.
        num_keep: [1], rows of either kind; the graph's input of this name counts visual tokens alone.
        min_keep_per_image: so many of each image come right behind text, the best first. An image is a run of tokens
            between two of text.

    Returns:
        [B, K], int64, ascending. Ties go to the lowest position; rows beyond T repeat the last one.
    """
    import torch

    kept: list[torch.Tensor] = []
    for row in scores:
        is_text = row.isposinf()
        image = is_text.cumsum(0)
        best = row.masked_fill(row.isnan(), -torch.inf).argsort(descending=True, stable=True)
        is_first = is_text.clone()
        for one in image.unique():
            is_first[best[(image == one)[best] & ~is_text[best]][:min_keep_per_image]] = True
        first, rest = best[is_first[best]], best[~is_first[best]]
        chosen = torch.cat([first, rest])[: int(num_keep)].sort().values
        kept.append(torch.cat([chosen, chosen.new_full((int(num_keep) - len(chosen),), len(row) - 1)]))
    return torch.stack(kept)


@triton.jit
def order_tokens(scores, order, num_tokens, min_keep_per_image, ROWS: tl.constexpr, OTHERS: tl.constexpr):
    """Writes a number for every token that is higher the earlier it is to be kept, of 33 bits, equal for ties."""
    base = tl.program_id(1).to(tl.int64) * num_tokens
    start = tl.program_id(0) * ROWS
    row = start + tl.arange(0, ROWS)
    own = tl.load(scores + base + row, mask=row < num_tokens, other=float("-inf"))
    is_text = own == float("inf")
    own = tl.where(own >= float("-inf"), own, float("-inf"))  # NaN is not.
    is_first = is_text
    if min_keep_per_image > 0:
        text_end = tl.full([OTHERS], 0, tl.int32)
        for before in range(0, start, OTHERS):
            column = before + tl.arange(0, OTHERS)
            other = tl.load(scores + base + column, mask=column < start, other=0)
            text_end = tl.where(other == float("inf"), column + 1, text_end)
        image_start = tl.max(text_end)
        # Images are numbered from the one that holds, or ends before, the first token of this block.
        image = tl.cumsum(is_text.to(tl.int32))
        last_image = tl.max(image)
        num_text = 0
        ahead = tl.full([ROWS, OTHERS], 0, tl.int32)
        while (image_start < num_tokens) & (num_text <= last_image):
            column = image_start + tl.arange(0, OTHERS)
            other = tl.load(scores + base + column, mask=column < num_tokens, other=float("inf"))
            other_is_text = (other == float("inf")).to(tl.int32)
            other = tl.where(other >= float("-inf"), other, float("-inf"))
            # No row has image -1: text is ahead of nothing here.
            other_image = tl.where(other_is_text == 1, -1, num_text + tl.cumsum(other_is_text))
            higher = other[None, :] > own[:, None]
            tied = (other[None, :] == own[:, None]) & (column[None, :] < row[:, None])
            ahead += ((higher | tied) & (other_image[None, :] == image[:, None])).to(tl.int32)
            num_text += tl.sum(other_is_text)
            image_start += OTHERS
        is_first = is_text | (tl.sum(ahead, axis=1) < min_keep_per_image)
    # A float's bits are sign and magnitude: as two's complement they are in order, and -0.0 equals 0.0.
    bits = own.to(tl.int32, bitcast=True)
    value = tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits).to(tl.int64) + 0x80000000
    tl.store(order + base + row, tl.where(is_first, value + 0x100000000, value), mask=row < num_tokens)


@triton.jit
def keep_best(order, kept, num_tokens, num_rows, BLOCK: tl.constexpr):
    """Finds the highest number that `num_rows` tokens reach, bit by bit, and writes where those tokens stand."""
    batch = tl.program_id(0).to(tl.int64)
    order += batch * num_tokens
    kept += batch * num_rows
    threshold = tl.full([], 0, tl.int64)
    bit = tl.full([], 0x100000000, tl.int64)
    num_above = 0
    while bit > 0:
        reached = tl.full([BLOCK], 0, tl.int32)
        for start in range(0, num_tokens, BLOCK):
            column = start + tl.arange(0, BLOCK)
            value = tl.load(order + column, mask=column < num_tokens, other=-1)
            reached += (value >= threshold + bit).to(tl.int32)
        num_reached = tl.sum(reached)
        enough = num_reached >= num_rows
        threshold = tl.where(enough, threshold + bit, threshold)
        # The last number that too few reach is the threshold's successor.
        num_above = tl.where(enough, num_above, num_reached)
        bit = bit >> 1
    num_kept = 0
    num_tied = 0
    for start in range(0, num_tokens, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(order + column, mask=column < num_tokens, other=-1)
        tied = (value == threshold).to(tl.int32)
        earlier_ties = num_tied + tl.cumsum(tied) - tied
        keep = (value > threshold) | ((tied == 1) & (earlier_ties < num_rows - num_above))
        slot = num_kept + tl.cumsum(keep.to(tl.int32)) - 1
        tl.store(kept + slot, column.to(tl.int64), mask=keep)
        num_kept += tl.sum(keep.to(tl.int32))
        num_tied += tl.sum(tied)
    # The next kernel reads as many rows as were asked for, whether there are tokens for them or not.
    for start in range(num_tokens, num_rows, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        tl.store(kept + slot, tl.full([BLOCK], 0, tl.int64) + num_tokens - 1, mask=slot < num_rows)


def _launches(size: Any) -> list[Launch]:
    return [
        Launch(
            kernel=order_tokens,
            grid=(ceil_div(size.tokens, _ROWS), size.batch, 1),
            args=("scores", "order", size.tokens, "min_keep_per_image"),
            constants={"ROWS": _ROWS, "OTHERS": _OTHERS},
        ),
        Launch(
            kernel=keep_best,
            grid=(size.batch, 1, 1),
            args=("order", "kept", size.tokens, size.kept),
            constants={"BLOCK": _BLOCK},
            warps=_SEARCH_WARPS,
        ),
    ]


def _cost(size: Any) -> Cost:
    """Reads scores, writes positions; comparisons are not FLOPs."""
    return Cost(bytes=size.batch * (4 * size.tokens + 8 * size.kept), flops=0)


OPERATOR = Operator(
    name="TopKKeep",
    inputs={"scores": Tensor("fp32", ("batch", "tokens")), "num_keep": Tensor("int64", (1,))},
    outputs={"kept": Tensor("int64", ("batch", "kept"))},
    attributes={"min_keep_per_image": int},
    launches=_launches,
    cost=_cost,
    scratch=lambda size: {"order": Scratch("int64", size.batch * size.tokens)},
    value_inputs={"num_keep": "kept"},
)
