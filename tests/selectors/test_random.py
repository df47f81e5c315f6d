"""A keyed permutation of the rows: the same everywhere, and as good as chance."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from capa_export.selectors.selector import TensorView
from tests.selectors.one_score import build, graph_scores, layout, reference_scores, same


def view(is_visual: torch.Tensor, num_keep: int) -> TensorView:
    return TensorView(is_visual=is_visual, num_keep=num_keep, hidden=torch.zeros(len(is_visual), 4))


def scores(rows: int, seed: int) -> np.ndarray:
    return reference_scores("random", view(layout(0, rows), 1), seed=seed).numpy()


@pytest.mark.parametrize("runs", [(0, 63), (3, 64, 2), (1, 40, 5, 60, 7), (2, 7, 1)])
@pytest.mark.parametrize("seed", [0, 1, 46337, 10**12])
def test_graph_and_reference_give_the_same_whole_numbers(runs: tuple[int, ...], seed: int) -> None:
    prompt = view(layout(*runs), 5)
    ours, theirs = graph_scores("random", prompt, seed=seed), reference_scores("random", prompt, seed=seed)
    assert ours[prompt.is_visual].tolist() == theirs[prompt.is_visual].tolist()


def test_every_number_of_tokens_keeps_the_same_set() -> None:
    kept = [set(same("random", view(layout(2, 9, 2), num_keep)).tolist()) for num_keep in range(1, 10)]
    assert all(few < more for few, more in pairwise(kept))


def test_a_prompt_has_no_ties() -> None:
    assert len(set(scores(46337, 3))) == 46337


def test_every_row_stays_as_often_as_any_other() -> None:
    rows, seeds, share = 64, 2000, 0.25
    counts = np.zeros(rows)
    for seed in range(seeds):
        counts[np.argsort(-scores(rows, seed))[: int(rows * share)]] += 1
    # Each count is binomial; their standardised squares sum to chi-square of 63 degrees: 45 to 83 in 19 cases of 20.
    chi_square = ((counts - seeds * share) ** 2 / (seeds * share * (1 - share))).sum()
    assert 35 < chi_square < 100


def test_neither_seeds_nor_neighbours_go_together() -> None:
    draws = np.stack([scores(2000, seed) for seed in (0, 1, 2, 3, 46337, 46338)])
    # Of 2000 independent pairs, the deviation is 0.022.
    assert np.abs(np.corrcoef(draws) - np.eye(len(draws))).max() < 0.09
    for draw in draws:
        for distance in (1, 2, 7, 24, 32):
            assert abs(np.corrcoef(draw[:-distance], draw[distance:])[0, 1]) < 0.09


def test_prompts_of_other_lengths_have_nothing_in_common() -> None:
    """Neither the same rows nor those that are as far from the end."""
    shorter = scores(2000, 0)
    for more in (1, 2, 7, 64):
        longer = scores(2000 + more, 0)
        for aligned in (longer[:2000], longer[more:]):
            assert abs(np.corrcoef(shorter, aligned)[0, 1]) < 0.09


def test_shares_of_the_range_are_even() -> None:
    counts, _ = np.histogram(scores(20000, 5), bins=20, range=(0, 46337))
    assert ((counts - 1000) ** 2 / 1000).sum() < 40


@pytest.mark.trt
def test_builds(tmp_path: Path) -> None:
    assert build("random", view(layout(1, 8, 2), 4), tmp_path)["layers"] > 0
