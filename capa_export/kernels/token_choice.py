"""LikeliestToken and SampledToken: the next token of every answer, chosen from logits on the device.

They choose as `run.decoding.TokenChooser` does with penalty, temperature, top-k, top-p and min-p, from the same noise.
Nothing is sorted: the lowest score that is still likely enough is searched for bit by bit.

B = batch, V = vocabulary.
"""

# Triton's language is untyped, and a kernel's arguments are pointers and numbers.
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false

from typing import Any

import triton
import triton.language as tl

from capa_export.kernels.operator import Cost, Launch, Operator, Scratch, Tensor, ceil_div

__all__ = ["COLDEST", "LIKELIEST", "NEVER", "SAMPLED", "SEEN"]

SEEN, NEVER = 1, 2
"""Marks of a token: said before, and not to be said."""
COLDEST = 1e-20
"""A temperature at which only the likeliest token is left, and no logit becomes infinite."""

_BLOCK = 1024
_CHUNK, _WARPS = 4096, 16
_LISTED = 1024
"""Candidates that are looked at side by side; top-k rarely leaves more."""


@triton.jit
def ranks_of(score):
    """Whole numbers from 0 in the order of the scores, which are numbers; -0.0 equals 0.0."""
    bits = score.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits).to(tl.int64) + 0x80000000


@triton.jit
def find_highest(scores, count, wanted, BLOCK: tl.constexpr):
    """The highest rank that `wanted` of the scores reach."""
    threshold = tl.full([], 0, tl.int64)
    bit = tl.full([], 0x80000000, tl.int64)
    while bit > 0:
        reached = tl.full([BLOCK], 0, tl.int32)
        for start in range(0, count, BLOCK):
            at = start + tl.arange(0, BLOCK)
            rank = ranks_of(tl.load(scores + at, mask=at < count, other=float("-inf")))
            reached += ((rank >= threshold + bit) & (at < count)).to(tl.int32)
        threshold = tl.where(tl.sum(reached) >= wanted, threshold + bit, threshold)
        bit = bit >> 1
    return threshold


@triton.jit
def score_tokens(logits, marks, numbers, scores, best, best_token, num_tokens, num_blocks, BLOCK: tl.constexpr):
    """Writes the scores, and of every block the highest and where it stands first; +inf if a logit is no number."""
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = column < num_tokens
    logit = tl.load(logits + row * num_tokens + column, mask=mask, other=float("-inf"))
    mark = tl.load(marks + row * num_tokens + column, mask=mask, other=0)
    penalty = tl.load(numbers)
    score = tl.where((mark & 1) != 0, tl.where(logit < 0, logit * penalty, tl.div_rn(logit, penalty)), logit)
    # Rounded as the host's, or a temperature of 1 could change which of two is the higher.
    score = tl.div_rn(tl.where((mark & 2) != 0, float("-inf"), score), tl.load(numbers + 1))
    score = tl.where((logit < float("inf")) & (score < float("inf")), score, float("inf"))
    tl.store(scores + row * num_tokens + column, score, mask=mask)
    highest = tl.max(score)
    first = tl.min(tl.where(score == highest, column, num_tokens))
    tl.store(best + row * num_blocks + tl.program_id(0), highest)
    tl.store(best_token + row * num_blocks + tl.program_id(0), first)


@triton.jit
def finish(token, most, row, marks, said, tokens, num_tokens):
    # In place of a token, -1 where a logit is no number, and -2 where none is left.
    token = tl.where(most < float("inf"), tl.where(most > float("-inf"), token, -2), -1)
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(said + row, tl.load(said + row) + 1)
    at = marks + row * num_tokens + token
    tl.store(at, tl.load(at, mask=token >= 0, other=0) | 1, mask=token >= 0)


@triton.jit
def take_likeliest(best, best_token, marks, said, tokens, num_tokens, num_blocks, BLOCKS: tl.constexpr):
    """The first of the tokens with the highest score."""
    row = tl.program_id(0).to(tl.int64)
    highest = tl.full([BLOCKS], float("-inf"), tl.float32)
    first = tl.full([BLOCKS], 0, tl.int32)
    for start in range(0, num_blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        score = tl.load(best + row * num_blocks + block, mask=block < num_blocks, other=float("-inf"))
        token = tl.load(best_token + row * num_blocks + block, mask=block < num_blocks, other=0)
        first = tl.where(score > highest, token, first)
        highest = tl.where(score > highest, score, highest)
    most = tl.max(highest)
    chosen = tl.min(tl.where(highest == most, first, num_tokens))
    finish(chosen, most, row, marks, said, tokens, num_tokens)


@triton.jit
def list_candidates(
    scores,
    best,
    top_k,
    candidate,
    candidate_score,
    num_candidates,
    num_tokens,
    num_blocks,
    CHUNK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Lists tokens, lowest first, that may be among the highest `top_k`: all that reach as many blocks' highest."""
    row = tl.program_id(0).to(tl.int64)
    wanted = tl.load(top_k)
    lowest = tl.full([], 0, tl.int64)
    if (wanted > 0) & (wanted <= num_blocks):
        lowest = find_highest(best + row * num_blocks, num_blocks, wanted, BLOCKS)
    count = 0
    for start in range(0, num_tokens, CHUNK):
        column = start + tl.arange(0, CHUNK)
        score = tl.load(scores + row * num_tokens + column, mask=column < num_tokens, other=float("-inf"))
        listed = (score > float("-inf")) & (ranks_of(score) >= lowest)
        slot = row * num_tokens + count + tl.cumsum(listed.to(tl.int32)) - 1
        tl.store(candidate + slot, column, mask=listed)
        tl.store(candidate_score + slot, score, mask=listed)
        count += tl.sum(listed.to(tl.int32))
    tl.store(num_candidates + row, count)


@triton.jit
def sample_token(
    candidate,
    candidate_score,
    num_candidates,
    numbers,
    top_k,
    keys,
    marks,
    said,
    tokens,
    num_tokens,
    BLOCK: tl.constexpr,
):
    """Draws one of the candidates that are likely enough."""
    row = tl.program_id(0).to(tl.int64)
    candidate += row * num_tokens
    candidate_score += row * num_tokens
    count = tl.load(num_candidates + row)
    top_p = tl.load(numbers + 2)
    min_p = tl.load(numbers + 3)
    wanted = tl.load(top_k)
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        score = tl.load(candidate_score + at, mask=at < count, other=float("-inf"))
        highest = tl.maximum(highest, score)
    most = tl.max(highest)
    # The lowest rank that is likely enough; of the tokens that have it, the first few may not be.
    lowest = tl.full([], 0, tl.int64)
    if (wanted > 0) & (wanted < count):
        lowest = find_highest(candidate_score, count, wanted, BLOCK)
    above = tl.full([], 0.0, tl.float32)
    each = tl.full([], 0.0, tl.float32)
    mass = tl.full([], 1.0, tl.float32)
    num_tied = 0
    if top_p < 1:
        weights = tl.full([BLOCK], 0.0, tl.float32)
        for start in range(0, count, BLOCK):
            at = start + tl.arange(0, BLOCK)
            score = tl.load(candidate_score + at, mask=at < count, other=float("-inf"))
            weights += tl.where(ranks_of(score) >= lowest, tl.exp(score - most), 0.0)
        # The highest stays, even if no mass at all is asked for.
        mass = tl.maximum(top_p * tl.sum(weights), 1e-30)
        # What is above the last that stays has less than that mass.
        last = tl.full([], 0, tl.int64)
        bit = tl.full([], 0x80000000, tl.int64)
        while bit > 0:
            weights = tl.full([BLOCK], 0.0, tl.float32)
            for start in range(0, count, BLOCK):
                at = start + tl.arange(0, BLOCK)
                score = tl.load(candidate_score + at, mask=at < count, other=float("-inf"))
                rank = ranks_of(score)
                weights += tl.where((rank >= lowest) & (rank >= last + bit), tl.exp(score - most), 0.0)
            last = tl.where(tl.sum(weights) < mass, last, last + bit)
            bit = bit >> 1
        lowest = tl.maximum(lowest, last)
        weights = tl.full([BLOCK], 0.0, tl.float32)
        tied_weight = tl.full([BLOCK], 0.0, tl.float32)
        ties = tl.full([BLOCK], 0, tl.int32)
        for start in range(0, count, BLOCK):
            at = start + tl.arange(0, BLOCK)
            score = tl.load(candidate_score + at, mask=at < count, other=float("-inf"))
            rank = ranks_of(score)
            weight = tl.exp(score - most)
            tied = (rank == lowest) & (at < count)
            weights += tl.where(rank > lowest, weight, 0.0)
            tied_weight = tl.where(tied, weight, tied_weight)
            ties += tied.to(tl.int32)
        above = tl.sum(weights)
        each = tl.max(tied_weight)
        num_tied = tl.sum(ties)
    key = tl.load(keys + row)
    draw = tl.load(said + row)
    drawn = tl.full([BLOCK], float("-inf"), tl.float32)
    choice = tl.full([BLOCK], -1, tl.int32)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < count
        score = tl.load(candidate_score + at, mask=inside, other=float("-inf"))
        token = tl.load(candidate + at, mask=inside, other=0)
        rank = ranks_of(score)
        tied = ((rank == lowest) & inside).to(tl.int32)
        # As of a sort that keeps ties in order, of which the last tokens stay.
        num_tied -= tl.sum(tied)
        behind = num_tied + tl.sum(tied) - tl.cumsum(tied)
        stays = (rank > lowest) | ((tied == 1) & (above + behind.to(tl.float32) * each < mass))
        stays = stays & inside & (tl.exp(score - most) >= min_p)
        zero = token * 0
        bits, _1, _2, _3 = tl.philox(key, token, zero + draw, zero, zero)
        # Small where the noise is large, so that the largest are told apart; and never 0 or 1.
        uniform = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
        series = uniform * (1 + uniform * (0.5 + uniform * (0.33333334 + uniform * 0.25)))
        wait = tl.where(uniform < 0.015625, series, -tl.log(1 - uniform))
        noisy = tl.where(stays, score - most - tl.log(wait), float("-inf"))
        choice = tl.where(noisy > drawn, token, choice)
        drawn = tl.where(noisy > drawn, noisy, drawn)
    chosen = tl.min(tl.where(drawn == tl.max(drawn), choice, num_tokens))
    finish(chosen, most, row, marks, said, tokens, num_tokens)


def _score(size: Any) -> Launch:
    blocks = ceil_div(size.vocabulary, _BLOCK)
    return Launch(
        kernel=score_tokens,
        grid=(blocks, size.batch, 1),
        args=("logits", "marks", "numbers", "scores", "best", "best_token", size.vocabulary, blocks),
        constants={"BLOCK": _BLOCK},
    )


def _likeliest(size: Any) -> list[Launch]:
    take = Launch(
        kernel=take_likeliest,
        grid=(size.batch, 1, 1),
        args=("best", "best_token", "marks", "said", "tokens", size.vocabulary, ceil_div(size.vocabulary, _BLOCK)),
        constants={"BLOCKS": 256},
    )
    return [_score(size), take]


def _sampled(size: Any) -> list[Launch]:
    candidates = ("candidate", "candidate_score", "num_candidates")
    find = Launch(
        kernel=list_candidates,
        grid=(size.batch, 1, 1),
        args=("scores", "best", "top_k", *candidates, size.vocabulary, ceil_div(size.vocabulary, _BLOCK)),
        constants={"CHUNK": _CHUNK, "BLOCKS": 256},
        warps=_WARPS,
    )
    sample = Launch(
        kernel=sample_token,
        grid=(size.batch, 1, 1),
        args=(*candidates, "numbers", "top_k", "keys", "marks", "said", "tokens", size.vocabulary),
        constants={"BLOCK": _LISTED},
    )
    return [_score(size), find, sample]


def _scratch(size: Any) -> dict[str, Scratch]:
    blocks = size.batch * ceil_div(size.vocabulary, _BLOCK)
    return {
        "scores": Scratch("fp32", size.batch * size.vocabulary),
        "best": Scratch("fp32", blocks),
        "best_token": Scratch("int32", blocks),
    }


def _sampling_scratch(size: Any) -> dict[str, Scratch]:
    return _scratch(size) | {
        "candidate": Scratch("int32", size.batch * size.vocabulary),
        "candidate_score": Scratch("fp32", size.batch * size.vocabulary),
        "num_candidates": Scratch("int32", size.batch),
    }


def _cost(size: Any) -> Cost:
    """Reads logits and marks."""
    return Cost(bytes=size.batch * (8 * size.vocabulary + 8), flops=0)


_INPUTS = {
    "logits": Tensor("fp32", ("batch", "vocabulary")),
    "marks": Tensor("int32", ("batch", "vocabulary")),
    "numbers": Tensor("fp32", (4,)),
    "said": Tensor("int32", ("batch",)),
}
_OUTPUTS = {"tokens": Tensor("int64", ("batch",))}

LIKELIEST = Operator(
    name="LikeliestToken",
    inputs=_INPUTS,
    outputs=_OUTPUTS,
    attributes={},
    launches=_likeliest,
    cost=_cost,
    scratch=_scratch,
)
SAMPLED = Operator(
    name="SampledToken",
    inputs=_INPUTS | {"top_k": Tensor("int32", (1,)), "keys": Tensor("int64", ("batch",))},
    outputs=_OUTPUTS,
    attributes={},
    launches=_sampled,
    cost=_cost,
    scratch=_sampling_scratch,
)
