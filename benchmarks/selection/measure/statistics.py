"""Figures that describe distributions, rankings, and how two of them differ."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from benchmarks.selection.figures import Spread

__all__ = [
    "FEWEST",
    "FLAT_COEFFICIENT",
    "FLAT_SPLIT",
    "bimodality",
    "hellinger",
    "overlap",
    "spearman",
    "split",
    "spread_of",
]

FEWEST = 20
"""Values that a bimodality is told of."""
FLAT_COEFFICIENT = 5 / 9
FLAT_SPLIT = 0.75
"""Value of a flat distribution: two groups have more of both."""


def spread_of(values: ArrayLike, eta: float) -> Spread:
    """Mean, percentiles, and the share at eta or below."""
    found = np.asarray(values, np.float64)
    p05, p25, p50, p75, p95 = np.percentile(found, [5, 25, 50, 75, 95]).tolist()
    below = float((found <= eta).mean())
    return Spread(mean=float(found.mean()), p05=p05, p25=p25, p50=p50, p75=p75, p95=p95, below=below)


def bimodality(values: ArrayLike) -> float:
    """Sarle's coefficient (skewness^2 + 1) / kurtosis, of samples: 5/9 where flat, 1/3 for a normal distribution.

    Skewness alone raises it, so that `split` has to agree.
    """
    found = np.asarray(values, np.float64)
    n, centred = len(found), found - found.mean()
    second, third, fourth = (float((centred**power).mean()) for power in (2, 3, 4))
    skewness = third / second**1.5 * np.sqrt(n * (n - 1)) / (n - 2)
    excess = (n - 1) / ((n - 2) * (n - 3)) * ((n + 1) * (fourth / second**2 - 3) + 6)
    return float((skewness**2 + 1) / (excess + 3 * (n - 1) ** 2 / ((n - 2) * (n - 3))))


def split(values: ArrayLike) -> float:
    """Largest share of the variance between the two sides of a cut (Otsu): 0.75 where flat, 0.64 where normal."""
    found = np.sort(np.asarray(values, np.float64))
    found -= found.mean()
    n, sums = len(found), found.cumsum()[:-1]
    left = np.arange(1, n)
    between = sums**2 * (1 / left + 1 / (n - left))
    return float(between.max() / (found**2).sum())


def spearman(first: ArrayLike, second: ArrayLike) -> float:
    """Correlation of the ranks; 0 where one of the two ranks nothing."""
    a, b = (_ranks(np.asarray(values)) for values in (first, second))
    scale = a.std() * b.std()
    return float(((a - a.mean()) * (b - b.mean())).mean() / scale) if scale else 0.0


def _ranks(values: NDArray[np.floating]) -> NDArray[np.float64]:
    """Equal ones share the mean of their places."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[inverse]


def overlap(first: ArrayLike, second: ArrayLike, count: int) -> float:
    """Share of the `count` best of one that is among those of the other."""
    a, b = (set(np.argsort(-np.asarray(values), kind="stable")[:count].tolist()) for values in (first, second))
    return len(a & b) / count


def hellinger(first_V: ArrayLike, second_V: ArrayLike) -> float:
    """Distance of the distributions that two rows of logits give: 0 for the same, 1 for disjoint ones."""
    p, q = (_softmax(np.asarray(logits, np.float64)) for logits in (first_V, second_V))
    # Half the squared difference, since 1 - sum sqrt(p q) would round a small distance away.
    return float(np.sqrt(((np.sqrt(p) - np.sqrt(q)) ** 2).sum() / 2))


def _softmax(logits_V: NDArray[np.float64]) -> NDArray[np.float64]:
    exponents = np.exp(logits_V - logits_V.max())
    return exponents / exponents.sum()
