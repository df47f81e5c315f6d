"""Distances are the worst of all tokens, steps and prompts; an answer's few states are not lost among a prompt's."""

import numpy as np
import pytest

from capa_export.base.statistics import kl_divergence
from capa_export.parity.distance import Distance, VectorDistance
from capa_export.parity.trace import Trace

LOGITS = np.zeros((2, 3))
"""Of two steps."""


def test_one_wrong_vector_of_many_counts() -> None:
    reference = np.tile([1.0, 0.0], (9, 1))
    turned, longer = reference.copy(), reference.copy()
    turned[4] = np.cos(0.3), np.sin(0.3)
    longer[7] *= 1.3
    for found, wanted in ((turned, (np.cos(0.3), 0, 2 * np.sin(0.15))), (longer, (1, 0.3, 0.3))):
        seen = VectorDistance()
        for own in (reference, found, reference):
            seen.add(own, reference)
        assert (seen.cosine, seen.norm_ratio, seen.length) == pytest.approx(wanted)


def test_states_within_a_difference_are_told_from_those_beyond() -> None:
    hidden = np.array([[[0.1, 0.0], [5.0, 0.0], [np.nan, 0.0], [5.0, 0.0]]])
    reference, seen = Trace(LOGITS, [], hidden=hidden), Distance()
    own = hidden + np.array([[0.0, 0.3], [0.4, 0.0], [0.0, 0.0], [0.0, 0.0]])
    for room in (0.35, 0.45):
        seen.add_states(Trace(LOGITS, [], hidden=own), reference, [room])
    (every,), (beyond,) = seen.layers, seen.beyond
    assert (every.cosine, every.norm_ratio) == pytest.approx((0.1**0.5, 10**0.5 - 1))
    assert (beyond.cosine, beyond.norm_ratio) == pytest.approx((1, 0.08))
    assert seen.differences == [pytest.approx([0.3, 0.4, 0.0] * 2)]


@pytest.mark.parametrize(("own", "wanted"), [(np.nan, 1.0), (1.0, np.nan)])
def test_what_is_not_finite_is_beyond_any_difference(own: float, wanted: float) -> None:
    traces = (Trace(LOGITS, [], hidden=np.full((1, 2, 3), value)) for value in (own, wanted))
    seen = Distance()
    seen.add_states(*traces, [np.inf])
    assert [(one.cosine, one.norm_ratio) for one in (*seen.layers, *seen.beyond)] == [(-np.inf, np.inf)] * 2


@pytest.mark.parametrize(
    ("row", "error"),
    [
        # Of three rows of the prompt, one of which was dropped; and of the one that is the answer's.
        (0, 0.1 / 2**0.5),
        (2, 0.1 / 2**0.5),
        (3, 0.1),
    ],
)
def test_states_of_an_answer_have_a_norm_of_their_own(row: int, error: float) -> None:
    hidden = np.tile([0.6, 0.8], (2, 4, 1))
    hidden[1, 1] = np.nan
    wrong = hidden.copy()
    wrong[1, row] *= 1.1
    reference, seen = Trace(LOGITS, [], hidden=hidden), Distance()
    for own in (hidden, wrong, hidden):
        seen.add_states(Trace(LOGITS, [], hidden=own), reference)
    assert seen.layer_errors == pytest.approx([0, error])
    assert [layer.norm_ratio for layer in seen.layers] == pytest.approx([0, 0.1])


def test_the_worst_prompts_features_count() -> None:
    features = np.tile([0.6, 0.8], (4, 1))
    reference, seen = Trace(LOGITS, [], features=features), Distance()
    for scale in (1.0, 1.2, 1.0):
        seen.add_states(Trace(LOGITS, [], features=scale * features), reference)
    assert seen.features_error == pytest.approx(0.2)
    assert seen.features is not None and seen.features.norm_ratio == pytest.approx(0.2)


def test_the_worst_step_counts() -> None:
    reference, seen = np.array([4.0, 0.0, -8.0]), Distance()
    for change in (0.0, 0.4, 0.1):
        seen.add_logits(reference + np.array([0, change, 0]), reference)
    assert (seen.difference, seen.relative_error) == pytest.approx((0.4, 0.05))
    assert seen.kl > 0


def test_the_kl_to_expect_is_that_of_differences_as_large_at_the_steps_that_they_matter_to() -> None:
    """Steps that are sure of their token take the noise; where two tokens compete, the same noise would have shown."""
    sure, open_ = np.array([9.0, 0.0, -9.0]), np.array([2.0, 2.0, -9.0])
    random, worst, expected = np.random.default_rng(0), [], []
    for _ in range(100):
        seen, noise = Distance(), random.normal(0, 0.01, (64, 3))
        for change in noise:
            seen.add_logits(sure + change, sure)
        seen.add_logits(open_, open_)
        worst.append(max(kl_divergence(open_, open_ + change) for change in noise))
        expected.append(seen.expected_kl)
        assert seen.kl < seen.expected_kl / 100
    # One draw in as many lies beyond the quantile; the largest lies there on average.
    assert 0.8 < np.mean(expected) / np.mean(worst) < 1


def test_one_step_is_expected_to_do_no_less_than_on_average() -> None:
    seen = Distance()
    assert seen.expected_kl == 0
    seen.add_logits(np.array([0.01, -0.01]), np.zeros(2))
    assert seen.expected_kl == pytest.approx(0.5 * 1e-4 / 2)
