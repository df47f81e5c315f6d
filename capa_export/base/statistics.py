"""95 % intervals of shares and of paired differences, and the KL divergence of two predictions."""

import math
from collections.abc import Iterator, Sequence
from math import sqrt
from statistics import NormalDist
from typing import Annotated

import numpy as np
from numpy.typing import ArrayLike
from pydantic import BaseModel, BeforeValidator, ConfigDict

__all__ = [
    "Difference",
    "Entry",
    "Figure",
    "Rate",
    "difference_of_means",
    "difference_of_shares",
    "kl_divergence",
    "sign_test",
    "spread",
    "wilson",
]

_Z = 1.959964
"""Quantile of the normal distribution that leaves 2.5 % above it."""
_SUBSETS = 9999
"""Subsets that are averaged where there are more: with the identity of the sign flips, 10,000 of them."""


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


Figure = Annotated[float | None, BeforeValidator(_finite)]
"""A number; None where it came out as NaN or infinity."""


class Entry(BaseModel):
    """Base of all that reports hold: immutable, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Rate(Entry):
    """A share of the questions with its 95 % Wilson interval."""

    value: float
    low: float
    high: float


class Difference(Entry):
    """A mean of paired differences with its 95 % interval, which leaves 0 out only where an exact paired test does.

    Of yes and no it is Tango's score interval, widened to 0 where McNemar's exact test finds no difference. Of other
    figures, such as KL, it holds the differences that a sign-flip test does not reject.
    """

    value: float
    low: float
    high: float


def wilson(hits: Sequence[bool]) -> Rate:
    """The share of hits, of at least one try, with the Wilson score interval, which holds near 0 and 1 too."""
    count, share = len(hits), sum(hits) / len(hits)
    centre = share + _Z**2 / (2 * count)
    reach = _Z * sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
    scale = 1 + _Z**2 / count
    # Where all or none hit, rounding alone would carry an end past the share.
    low = (centre - reach) / scale if any(hits) else 0.0
    high = (centre + reach) / scale if not all(hits) else 1.0
    return Rate(value=share, low=low, high=high)


def sign_test(gained: int, lost: int) -> float:
    """Two-sided exact p that each of the pairs that differ is a gain or a loss with equal chance.

    This is McNemar's exact test: twice the smaller tail of a binomial distribution, at most 1.
    """
    pairs, fewer = gained + lost, min(gained, lost)
    ways = term = 1
    for taken in range(fewer):
        term = term * (pairs - taken) // (taken + 1)
        ways += term
    return min(1.0, ways / 2 ** max(pairs - 1, 0))


def difference_of_shares(first: Sequence[float], second: Sequence[float], level: float = 0.95) -> Difference:
    """Share of yes in first minus that in second, whose interval leaves 0 out where McNemar's exact test rejects it.

    The interval is Tango's ("Equivalence test and confidence interval for the difference in proportions for the
    paired-sample design", Statistics in Medicine 17, 1998): the differences that a score test does not reject. It has a
    width even where no pair differs. It is asymptotic, so it is widened to 0 where the exact test finds no difference.

    Args:
        first: 1 or True for a yes, 0 or False for a no, per question; at least one.
        second: the same of the same questions.
        level: coverage of the interval, and 1 - the level of the test.
    """
    pairs = [(bool(one), bool(other)) for one, other in zip(first, second, strict=True)]
    gained, lost, count = pairs.count((True, False)), pairs.count((False, True)), len(pairs)
    low, high = _tango_low(gained, lost, count, level), -_tango_low(lost, gained, count, level)
    if sign_test(gained, lost) > 1 - level:
        low, high = min(low, 0.0), max(high, 0.0)
    return Difference(value=(gained - lost) / count, low=low, high=high)


def _tango_low(gained: int, lost: int, count: int, level: float) -> float:
    """The least difference that Tango's score test does not reject, by bisection."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    low, high = -1.0, (gained - lost) / count
    for _ in range(60):
        middle = (low + high) / 2
        # The most likely chance of a loss where the difference is this one.
        b = (2 * count - gained + lost) * middle - gained - lost
        loss = (sqrt(b * b + 8 * count * lost * middle * (1 - middle)) - b) / (4 * count)
        if (gained - lost - count * middle) ** 2 > z * z * count * (2 * loss + middle * (1 - middle)):
            low = middle
        else:
            high = middle
    return high


def difference_of_means(first: Sequence[float], second: Sequence[float], level: float = 0.95) -> Difference:
    """Mean of first - second, with the interval of all differences that a sign-flip test does not reject.

    Where it is chance which of a question's two figures is first, the interval lies above 0 with a chance of at most
    (1 - level) / 2, and below it too, however heavy the tails are. Where differences are skewed about a mean of 0, it
    errs more often, as every interval of a few questions does: `benchmarks/intervals.py` measures both. Its ends are
    means of subsets (J. A. Hartigan, "Using subsample values as typical values", JASA 64, 1969), of all of them up to
    13 questions, else of 9,999 random ones. Where the questions are too few for the level, the interval goes from the
    least difference to the greatest, and holds 0.

    Args:
        first: a finite figure per question, at least one.
        second: another figure of the same questions.
        level: coverage of the interval.
    """
    differences = np.subtract(first, second, dtype=np.float64)
    means = np.concatenate(
        [subsets_SN @ differences / subsets_SN.sum(1) for subsets_SN in _subsets(len(differences))], dtype=np.float64
    )
    # What cancels out is 0, on neither side of it.
    means[np.abs(means) < 1e-12 * np.abs(differences).max()] = 0
    means.sort()
    rejected = int((1 - level) / 2 * (len(means) + 1))
    # The subset of none, the identity of the flips, counts as beyond either end.
    low, high = (means[rejected - 1], means[-rejected]) if rejected else (min(means[0], 0), max(means[-1], 0))
    return Difference(value=float(differences.mean()), low=float(low), high=float(high))


def _subsets(count: int) -> Iterator[np.ndarray]:
    """Subsets that are not empty as masks [S, N]: all of them, or random ones, the same every time."""
    if 2**count - 1 <= _SUBSETS:
        yield (np.arange(1, 2**count)[:, None] >> np.arange(count)) & 1
        return
    rng, wanted = np.random.default_rng(0), _SUBSETS
    while wanted:
        # A few at a time: all at once would take thousands of times the memory of the questions.
        rows, width = min(wanted, 1 + 1_000_000 // count), -(-count // 8)
        bits = np.frombuffer(rng.bytes(rows * width), np.uint8).reshape(rows, width)
        subsets_SN = np.unpackbits(bits, axis=1, count=count)
        subsets_SN = subsets_SN[subsets_SN.any(1)]
        wanted -= len(subsets_SN)
        yield subsets_SN


def kl_divergence(reference_V: ArrayLike, other_V: ArrayLike) -> float:
    """KL(reference || other) of the next token, in nats and in FP64, from logits [V] of any dtype."""
    with np.errstate(invalid="ignore"):
        p, q = (_log_softmax(np.asarray(logits_V, np.float64)) for logits_V in (reference_V, other_V))
        divergence = float((np.exp(p) * (p - q)).sum())
    # Rounding leaves a little below 0; max() would make 0 of a NaN.
    return 0.0 if divergence < 0 else divergence


def spread(logits_V: ArrayLike) -> float:
    """1 - the sum of squared probabilities of the next token, from logits [V]: 0 where one token is sure."""
    return float(1 - np.exp(2 * _log_softmax(np.asarray(logits_V, np.float64))).sum())


def _log_softmax(logits_V: np.ndarray) -> np.ndarray:
    shifted_V = logits_V - logits_V.max()
    return shifted_V - np.log(np.exp(shifted_V).sum())
