"""Intervals are those of the textbooks, and cover what they say they cover."""

import numpy as np
import pytest

from capa_export.base.statistics import kl_divergence, paired_bootstrap, wilson


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


def test_the_bootstrap_agrees_with_the_normal_interval_and_is_seeded() -> None:
    rng = np.random.default_rng(0)
    second = rng.normal(5, 3, 400)
    first = second + rng.normal(0.3, 1, 400)
    found = paired_bootstrap(first.tolist(), second.tolist(), 7)
    differences = first - second
    reach = 1.96 * differences.std(ddof=1) / 20
    assert found.value == pytest.approx(differences.mean())
    # An end of 2,000 resamples is itself uncertain by about 3 % of the reach; unpaired, it would be four times as far.
    assert (found.low, found.high) == pytest.approx((found.value - reach, found.value + reach), abs=0.12 * reach)
    assert paired_bootstrap(first.tolist(), second.tolist(), 7) == found
    assert paired_bootstrap(first.tolist(), second.tolist(), 8) != found


def test_the_bootstrap_covers_the_truth_about_nineteen_times_of_twenty() -> None:
    rng = np.random.default_rng(1)
    intervals = [paired_bootstrap(rng.exponential(1.0, 100).tolist(), [0.0] * 100, trial) for trial in range(60)]
    covered = sum(found.low <= 1 <= found.high for found in intervals)
    # 93 % is what a percentile interval reaches on so skew a distribution; 50 is three deviations below.
    assert covered >= 50


def test_no_difference_is_no_gain() -> None:
    found = paired_bootstrap([True, False], [True, False], 0)
    assert (found.value, found.low, found.high) == (0, 0, 0)


def test_a_higher_level_reaches_further() -> None:
    first, second = [float(i % 7) for i in range(60)], [float(i % 5) for i in range(60)]
    usual, wide = paired_bootstrap(first, second, 0), paired_bootstrap(first, second, 0, 0.9875)
    assert wide.value == usual.value and wide.low < usual.low and wide.high > usual.high


def test_kl_divergence_is_that_of_the_definition() -> None:
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.125, 0.125, 0.75])
    by_hand = 0.5 * np.log(4) + 0.25 * np.log(2) + 0.25 * np.log(1 / 3)
    # Logits are known up to a constant, here one whose exponential overflows.
    assert kl_divergence(np.log(p) + 1000, np.log(q)) == pytest.approx(by_hand, abs=1e-12)
    assert kl_divergence(np.log(q), np.log(q) - 5) == pytest.approx(0, abs=1e-15)
    assert kl_divergence(np.float16([40000, 0]), np.float16([0, 40000])) == 40000
    assert np.isnan(kl_divergence([np.nan, 0], [0, 0]))
    random = np.random.default_rng(0).normal(size=(200, 50))
    assert min(kl_divergence(row, row + noise) for row in random for noise in (0, 1e-9)) >= 0
