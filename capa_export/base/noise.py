"""Random numbers that a GPU and a CPU draw alike: each follows from a key and from what it is for."""

import numpy as np

__all__ = ["gumbel", "philox"]

_ROUNDS = 10
_FACTORS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_STEPS = 0x9E3779B9, 0xBB67AE85
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


def philox(key: int, counters: np.ndarray, second: int) -> np.ndarray:
    """The first 32 bits [N] of Philox4x32-10 (Salmon et al., 2011), as uint64.

    Args:
        key: of 64 bits.
        counters: [N], the first 32 bits of each counter.
        second: the 32 bits behind them; the others are zero.
    """
    c0, c1 = counters.astype(np.uint64) & _LOW, np.full(len(counters), second, np.uint64)
    c2 = c3 = np.zeros(len(counters), np.uint64)
    low, high = key & 0xFFFFFFFF, key >> 32
    for _ in range(_ROUNDS):
        first, other = c0 * _FACTORS[0], c2 * _FACTORS[1]
        c0, c1 = (other >> _HALF) ^ c1 ^ np.uint64(low), other & _LOW
        c2, c3 = (first >> _HALF) ^ c3 ^ np.uint64(high), first & _LOW
        low, high = (low + _STEPS[0]) & 0xFFFFFFFF, (high + _STEPS[1]) & 0xFFFFFFFF
    return c0


def gumbel(key: int, counters: np.ndarray, second: int) -> np.ndarray:
    """Gumbel noise [N], FP64; the largest of scores with it added is drawn by their softmax.

    Args:
        key: of 64 bits.
        counters: [N], below 2**32.
        second: below 2**32.
    """
    # Small where the noise is large, so that the largest are told apart; and never 0 or 1.
    uniform = (philox(key, counters, second) + 0.5) / 2.0**32
    return -np.log(-np.log1p(-uniform))
