"""95 % intervals of shares and of paired differences, and the KL divergence of two predictions."""

import math
from collections.abc import Sequence
from math import sqrt
from typing import Annotated

import numpy as np
from numpy.typing import ArrayLike
from pydantic import BaseModel, BeforeValidator, ConfigDict

__all__ = ["Difference", "Entry", "Figure", "Rate", "kl_divergence", "paired_bootstrap", "wilson"]

_Z = 1.959964
"""Quantile of the normal distribution that leaves 2.5 % above it."""
_RESAMPLES = 2000


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
    """A mean of paired differences with its 95 % bootstrap interval."""

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


def paired_bootstrap(first: Sequence[float], second: Sequence[float], seed: int, level: float = 0.95) -> Difference:
    """Mean of first - second with the percentile interval of 2,000 bootstrap resamples.

    Args:
        first: a finite figure per question, at least one.
        second: another figure of the same questions.
        seed: seed of the resamples.
        level: coverage of the interval.
    """
    differences = np.subtract(first, second, dtype=np.float64)
    rng, count = np.random.default_rng(seed), len(differences)
    # One resample at a time: all at once would take 2,000 times the memory of the questions.
    means = [differences[rng.integers(count, size=count)].mean() for _ in range(_RESAMPLES)]
    low, high = np.percentile(means, [50 * (1 - level), 50 * (1 + level)])
    return Difference(value=float(differences.mean()), low=float(low), high=float(high))


def kl_divergence(reference_V: ArrayLike, other_V: ArrayLike) -> float:
    """KL(reference || other) of the next token, in nats and in FP64, from logits [V] of any dtype."""
    with np.errstate(invalid="ignore"):
        p, q = (_log_softmax(np.asarray(logits_V, np.float64)) for logits_V in (reference_V, other_V))
        divergence = float((np.exp(p) * (p - q)).sum())
    # Rounding leaves a little below 0; max() would make 0 of a NaN.
    return 0.0 if divergence < 0 else divergence


def _log_softmax(logits_V: np.ndarray) -> np.ndarray:
    shifted_V = logits_V - logits_V.max()
    return shifted_V - np.log(np.exp(shifted_V).sum())
