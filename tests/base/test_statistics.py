"""Intervals are those of the textbooks, and cover what they say they cover."""

from itertools import product
from math import comb

import numpy as np
import pytest

from capa_export.base.statistics import (
    Difference,
    difference_of_means,
    difference_of_shares,
    kl_divergence,
    sign_test,
    wilson,
)


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    # Newcombe, "Two-sided confidence intervals for the single proportion" (1998), table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_intervals(hits: int, count: int, low: float, high: float) -> None:
    rate = wilson([True] * hits + [False] * (count - hits))
    assert rate.value == hits / count
    assert (rate.low, rate.high) == pytest.approx((low, high), abs=5e-5)
    other = wilson([False] * hits + [True] * (count - hits))
    assert (1 - other.high, 1 - other.low) == pytest.approx((rate.low, rate.high))


def test_wilson_stays_within_0_and_1_and_holds_the_share() -> None:
    for count in range(1, 60):
        for hits in range(count + 1):
            rate = wilson([True] * hits + [False] * (count - hits))
            assert 0 <= rate.low <= rate.value <= rate.high <= 1


def shares(gained: int, lost: int, count: int, level: float = 0.95) -> Difference:
    alike = [True] * (count - gained - lost)
    return difference_of_shares(
        [True] * gained + [False] * lost + alike, [False] * gained + [True] * lost + alike, level
    )


@pytest.mark.parametrize(
    ("gained", "lost", "count", "level", "low", "high"),
    # Tango, "Equivalence test and confidence interval for the difference in proportions for the paired-sample design"
    # (1998): two examples there, and no pair that differs.
    [(9, 3, 32, 0.95, -0.027, 0.390), (0, 1, 44, 0.9, -0.096, 0.037), (0, 0, 54, 0.95, -0.066, 0.066)],
)
def test_shares_have_the_published_interval(
    gained: int, lost: int, count: int, level: float, low: float, high: float
) -> None:
    found = shares(gained, lost, count, level)
    assert found.value == (gained - lost) / count
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-4)
    other = shares(lost, gained, count, level)
    assert (-other.high, -other.low) == (found.low, found.high)


def test_the_sign_test_is_the_tail_of_the_binomial() -> None:
    for gained in range(12):
        for lost in range(12):
            pairs = gained + lost
            ways = sum(comb(pairs, k) for k in range(pairs + 1) if abs(2 * k - pairs) >= abs(gained - lost))
            assert sign_test(gained, lost) == ways / 2**pairs
    # Fagerland, Lydersen and Laake, "The McNemar test for binary matched-pairs data" (2013): 1 and 7 discordant pairs.
    assert sign_test(1, 7) == pytest.approx(0.0703, abs=5e-5)
    assert sign_test(600, 600) == 1


def test_shares_are_sure_only_where_the_exact_test_is() -> None:
    """Four that differ, all one way, are not sure (p = 0.125); six are (p = 0.031); three of six are not."""
    assert shares(4, 0, 12).low == 0 and shares(0, 4, 12).high == 0
    assert shares(6, 0, 12).low > 0 and shares(0, 6, 12).high < 0
    assert shares(3, 0, 6).low <= 0
    for gained in range(25):
        for lost in range(25):
            for count in (max(1, gained + lost), gained + lost + 1, 180):
                found = shares(gained, lost, count)
                assert (found.low > 0 or found.high < 0) == (sign_test(gained, lost) <= 0.05)
                assert -1 <= found.low <= found.value <= found.high <= 1


def sign_flips(differences: np.ndarray, centre: float) -> tuple[float, float]:
    """One-sided p of all sign flips, that the mean is greater and that it is less."""
    far = differences - centre
    flipped = np.array([np.dot(signs, far) for signs in product((1, -1), repeat=len(far))])
    # Rounding must not part what is equal.
    return float((flipped >= far.sum() - 1e-12).mean()), float((flipped <= far.sum() + 1e-12).mean())


def test_means_hold_what_a_sign_flip_test_does_not_reject() -> None:
    rng = np.random.default_rng(3)
    for count in (6, 7, 9):
        first, second = np.exp(rng.normal(size=(2, count)))
        found = difference_of_means(first.tolist(), second.tolist())
        differences = first - second
        assert found.value == pytest.approx(differences.mean())
        step = 1e-9 * np.abs(differences).max()
        assert sign_flips(differences, found.low - step)[0] <= 0.025 < sign_flips(differences, found.low + step)[0]
        assert sign_flips(differences, found.high + step)[1] <= 0.025 < sign_flips(differences, found.high - step)[1]


def test_means_of_many_have_the_normal_interval() -> None:
    rng = np.random.default_rng(0)
    second = rng.normal(5, 3, 400)
    first = second + rng.normal(0.3, 1, 400)
    found = difference_of_means(first.tolist(), second.tolist())
    reach = 1.96 * (first - second).std(ddof=1) / 20
    # An end of 9,999 subsets is itself uncertain by about 1.4 % of the reach; unpaired, it would be four times as far.
    assert (found.low, found.high) == pytest.approx((found.value - reach, found.value + reach), abs=0.06 * reach)
    assert difference_of_means(first.tolist(), second.tolist()) == found


@pytest.mark.parametrize("count", [6, 16])
def test_means_are_rarely_sure_of_what_is_chance(count: int) -> None:
    """Log-normal figures of one distribution, in which bootstraps see a gain 5 to 9 times in a hundred."""
    rng = np.random.default_rng(1)
    trials = 300
    pairs = np.exp(2 * rng.normal(size=(trials, 2, count)))
    found = [difference_of_means(first.tolist(), second.tolist()) for first, second in pairs]
    # 7.5 are expected at most; 16 are three deviations more.
    assert sum(one.low > 0 for one in found) <= 16 and sum(one.high < 0 for one in found) <= 16


def test_a_few_differences_prove_nothing_whatever_they_are() -> None:
    found = difference_of_means([5, 6, 7, 8, 9], [0] * 5)
    assert (found.value, found.low, found.high) == (7, 0, 9)
    assert difference_of_means([5, 6, 7, 8, 9, 10], [0] * 6).low == 5
    assert difference_of_means([5, 6, 7, 8, 9, 10], [0] * 6, 0.9875).low == 0


def test_what_cancels_out_is_no_gain() -> None:
    """0.1 + 0.2 - 0.3 is 0 but for rounding, here in the subset that is the lower end."""
    found = difference_of_means([0.1, 0.2, 0.25, 0.29, 1, 1, 1, 0], [0] * 7 + [0.3])
    assert found.low == 0


def test_no_difference_of_means_is_no_gain() -> None:
    for count in (2, 8, 20):
        found = difference_of_means([0.5] * count, [0.5] * count)
        assert (found.value, found.low, found.high) == (0, 0, 0)


def test_a_higher_level_reaches_further() -> None:
    first, second = [float(i % 7) for i in range(60)], [float(i % 5) for i in range(60)]
    usual, wide = difference_of_means(first, second), difference_of_means(first, second, 0.9875)
    assert wide.value == usual.value and wide.low < usual.low and wide.high > usual.high
    usual, wide = shares(9, 3, 32), shares(9, 3, 32, 0.9875)
    assert wide.value == usual.value and wide.low < usual.low and wide.high > usual.high


def test_kl_divergence_is_that_of_the_definition() -> None:
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.125, 0.125, 0.75])
    by_hand = 0.5 * np.log(4) + 0.25 * np.log(2) + 0.25 * np.log(1 / 3)
    # Logits are known up to a constant, here one whose exponential overflows.
    assert kl_divergence(np.log(p) + 1000, np.log(q)) == pytest.approx(by_hand, abs=1e-12)
    assert kl_divergence(np.log(q), np.log(q) - 5) == pytest.approx(0, abs=1e-15)
    assert kl_divergence(np.array([40000, 0], np.float16), np.array([0, 40000], np.float16)) == 40000
    assert np.isnan(kl_divergence([np.nan, 0], [0, 0]))
    random = np.random.default_rng(0).normal(size=(200, 50))
    assert min(kl_divergence(row, row + noise) for row in random for noise in (0, 1e-9)) >= 0
