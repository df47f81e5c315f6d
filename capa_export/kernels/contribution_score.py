"""ContributionScore: how much each token adds to the hidden state of one query, || sum_h a_h v_g(h) W_O,h ||_2.

B = batch, T = tokens, D = hidden size, H = query heads, G = KV heads, d = head size, X = text tokens.
"""

# Triton's language is untyped, and a kernel's arguments are pointers and numbers.
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from capa_export.kernels.operator import Cost, Launch, Operator, Scratch, Tensor, ceil_div

if TYPE_CHECKING:
    import torch

__all__ = ["OPERATOR", "reference"]

_KEYS, _ROW, _FINISH, _TEXT = 32, 4096, 64, 32
# Two FP32 accumulators of 128 x 128 are 128 registers a thread of 8 warps, and a step's tiles of half 32 KiB: the
# highest reuse that spills nowhere and, double-buffered, fits the 99 KiB of the smallest GPUs.
_TOKENS, _COLUMNS, _WARPS = 128, 128, 8
_MAX_CHUNK = 64


def reference(
    query: "torch.Tensor",
    key: "torch.Tensor",
    value: "torch.Tensor",
    output_weight: "torch.Tensor",
    text_positions: "torch.Tensor",
    scale: float,
) -> "torch.Tensor":
    """What the kernels compute, all of it in FP32.

    Args:
        query: [B, H, 1, d], fp16, bf16 or fp32, of the prompt's last token.
        key: [B, G, T, d].
        value: [B, G, T, d].
        output_weight: [D, H * d].
        text_positions: [B, X], where text stands; ascending, and -1 behind the last of a prompt with less.
        scale: of the logits.

    Returns:
        [B, T], FP32: the norm, at most the largest finite number, and +inf where text stands. NaN stays NaN.
    """
    import torch

    repeats = query.shape[1] // key.shape[1]
    key_BHTd, value_BHTd = (x.float().repeat_interleave(repeats, dim=1) for x in (key, value))
    attention_BHT1 = (key_BHTd @ query.float().mT * scale).softmax(dim=2)
    weighted_BTP = (attention_BHT1 * value_BHTd).transpose(1, 2).flatten(2)
    written_BTD = weighted_BTP @ output_weight.float().T
    scores_BT = written_BTD.square().sum(dim=2).sqrt().clamp(max=torch.finfo(torch.float32).max)
    for scores, positions in zip(scores_BT, text_positions, strict=True):
        scores[positions[positions >= 0]] = torch.inf
    return scores_BT


@triton.jit
def attention_logits(
    query,
    key,
    logits,
    scale,
    num_heads,
    kv_heads,
    num_tokens,
    HEAD_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
):
    group = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, WIDTH)
    is_token = token < num_tokens
    is_column = column < HEAD_SIZE
    key_row = (batch * kv_heads + group) * num_tokens + token
    key_at = key_row[:, None] * HEAD_SIZE + column[None, :]
    keys = tl.load(key + key_at, mask=is_token[:, None] & is_column[None, :], other=0).to(tl.float32)
    group_size = num_heads // kv_heads
    for member in range(group_size):
        row = batch * num_heads + group * group_size + member
        one = tl.load(query + row * HEAD_SIZE + column, mask=is_column, other=0).to(tl.float32)
        logit = tl.sum(keys * one[None, :], axis=1) * scale
        tl.store(logits + row * num_tokens + token, logit, mask=is_token)


@triton.jit
def softmax(row, num_tokens, TOKENS: tl.constexpr):
    row += tl.program_id(0).to(tl.int64) * num_tokens
    highest = tl.full([TOKENS], float("-inf"), tl.float32)
    for start in range(0, num_tokens, TOKENS):
        token = start + tl.arange(0, TOKENS)
        highest = tl.maximum(highest, tl.load(row + token, mask=token < num_tokens, other=float("-inf")))
    # Without NaN, which comes back with the sum: it makes every token of the row NaN.
    peak = tl.max(highest, axis=0)
    total = tl.full([TOKENS], 0, tl.float32)
    for start in range(0, num_tokens, TOKENS):
        token = start + tl.arange(0, TOKENS)
        total += tl.exp(tl.load(row + token, mask=token < num_tokens, other=float("-inf")) - peak)
    sum_of_all = tl.sum(total, axis=0)
    for start in range(0, num_tokens, TOKENS):
        token = start + tl.arange(0, TOKENS)
        logit = tl.load(row + token, mask=token < num_tokens, other=float("-inf"))
        tl.store(row + token, tl.exp(logit - peak) / sum_of_all, mask=token < num_tokens)


@triton.jit
def written_squares(
    value,
    output_weight,
    attention,
    squares,
    num_heads,
    kv_heads,
    num_tokens,
    hidden_size,
    HEAD_SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # In FP32 a step takes as many bytes as in half, and half the columns at a time, so that nothing spills.
    WIDE: tl.constexpr = value.dtype.element_ty == tl.float32
    STEP: tl.constexpr = CHUNK // 2 if WIDE and CHUNK > 16 else CHUNK
    WIDTH: tl.constexpr = COLUMNS // 2 if WIDE else COLUMNS
    batch = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    is_token = token < num_tokens
    depth = tl.arange(0, STEP)
    projection = num_heads * HEAD_SIZE
    value_at = value + token[:, None] * HEAD_SIZE + depth[None, :]
    group_size = num_heads // kv_heads
    total = tl.full([TOKENS], 0, tl.float32)
    for start in tl.static_range(0, COLUMNS, WIDTH):  # pyright: ignore[reportGeneralTypeIssues]  # Triton unrolls it.
        column = tl.program_id(1) * COLUMNS + start + tl.arange(0, WIDTH)
        is_column = column < hidden_size
        weight_at = output_weight + column[None, :].to(tl.int64) * projection + depth[:, None]
        written = tl.full([TOKENS, WIDTH], 0, tl.float32)
        for at in range(0, projection, STEP):
            head = at // HEAD_SIZE
            group_row = (batch * kv_heads + head // group_size) * num_tokens
            values_from = group_row * HEAD_SIZE + (at - head * HEAD_SIZE)
            values = tl.load(value_at + values_from, mask=is_token[:, None], other=0)
            weights = tl.load(weight_at + at, mask=is_column[None, :], other=0)
            share = tl.load(attention + (batch * num_heads + head) * num_tokens + token, mask=is_token, other=0)
            # The share of attention meets the product in FP32: in half the smallest shares would be zero.
            written += share[:, None] * tl.dot(values, weights, input_precision="tf32x3")
        # Beyond the hidden size stands 0 * value, which need not be 0.
        written = tl.where(is_column[None, :], written, 0)
        total += tl.sum(written * written, axis=1)
    square_at = (batch * tl.num_programs(1) + tl.program_id(1)) * num_tokens + token
    tl.store(squares + square_at, total, mask=is_token)


@triton.jit
def finish(squares, text_positions, scores, num_tokens, num_blocks, num_text, TOKENS: tl.constexpr, TEXT: tl.constexpr):
    batch = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    is_token = token < num_tokens
    total = tl.full([TOKENS], 0, tl.float32)
    for block in range(num_blocks):
        total += tl.load(squares + (batch * num_blocks + block) * num_tokens + token, mask=is_token, other=0)
    norm = tl.sqrt_rn(total)
    # An overflowed score must not tie with text. A minimum would drop NaN.
    norm = tl.where(norm == float("inf"), 3.4028234663852886e38, norm)
    text = tl.full([TOKENS], 0, tl.int32)
    for start in range(0, num_text, TEXT):
        index = start + tl.arange(0, TEXT)
        position = tl.load(text_positions + batch * num_text + index, mask=index < num_text, other=-1)
        text = tl.maximum(text, tl.max((position[None, :] == token[:, None]).to(tl.int32), axis=1))
    tl.store(scores + batch * num_tokens + token, tl.where(text > 0, float("inf"), norm), mask=is_token)


def _scratch(size: Any) -> dict[str, Scratch]:
    return {
        "attention": Scratch("fp32", size.batch * size.heads * size.tokens),
        "squares": Scratch("fp32", ceil_div(size.hidden_size, _COLUMNS) * size.batch * size.tokens),
    }


def _launches(size: Any) -> list[Launch]:
    head_size: int = size.head_size
    return [
        Launch(
            kernel=attention_logits,
            grid=(ceil_div(size.tokens, _KEYS), size.kv_heads, size.batch),
            args=("query", "key", "attention", "scale", size.heads, size.kv_heads, size.tokens),
            constants={"HEAD_SIZE": head_size, "WIDTH": 1 << (head_size - 1).bit_length(), "TOKENS": _KEYS},
        ),
        Launch(
            kernel=softmax,
            grid=(size.batch * size.heads, 1, 1),
            args=("attention", size.tokens),
            constants={"TOKENS": _ROW},
            warps=8,
        ),
        Launch(
            kernel=written_squares,
            grid=(ceil_div(size.tokens, _TOKENS), ceil_div(size.hidden_size, _COLUMNS), size.batch),
            args=(
                *("value", "output_weight", "attention", "squares"),
                *(size.heads, size.kv_heads, size.tokens, size.hidden_size),
            ),
            constants={
                "HEAD_SIZE": head_size,
                # The largest power of two that divides it, so that nothing is padded.
                "CHUNK": min(head_size & -head_size, _MAX_CHUNK),
                "TOKENS": _TOKENS,
                "COLUMNS": _COLUMNS,
            },
            warps=_WARPS,
        ),
        Launch(
            kernel=finish,
            grid=(ceil_div(size.tokens, _FINISH), size.batch, 1),
            args=(
                *("squares", "text_positions", "scores"),
                *(size.tokens, ceil_div(size.hidden_size, _COLUMNS), size.num_text),
            ),
            constants={"TOKENS": _FINISH, "TEXT": _TEXT},
        ),
    ]


def _cost(size: Any) -> Cost:
    """Reads q, all of k, visual rows of v, W_O; the logits of all tokens and the product of visual ones with W_O."""
    visual = size.tokens - size.num_text
    projection = size.heads * size.head_size
    rows = size.batch * size.kv_heads * size.head_size * (size.tokens + visual)
    halves = size.batch * projection + rows + size.hidden_size * projection
    return Cost(
        bytes=2 * halves + 8 * size.batch * size.num_text + 4 * size.batch * size.tokens,
        flops=2 * size.batch * projection * (size.tokens + visual * size.hidden_size),
    )


OPERATOR = Operator(
    name="ContributionScore",
    inputs={
        "query": Tensor("real", ("batch", "heads", 1, "head_size"), has_batch=True),
        "key": Tensor("real", ("batch", "kv_heads", "tokens", "head_size"), has_batch=True),
        "value": Tensor("real", ("batch", "kv_heads", "tokens", "head_size"), has_batch=True),
        "output_weight": Tensor("real", ("hidden_size", "projection")),
        "text_positions": Tensor("int64", ("batch", "num_text")),
    },
    outputs={"scores": Tensor("fp32", ("batch", "tokens"))},
    attributes={"scale": float},
    launches=_launches,
    scratch=_scratch,
    cost=_cost,
    compiled_sizes=("head_size",),
    aligned_sizes=("hidden_size",),
)
