"""DART: nodes against the reference, and what it takes for each pivot."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from capa_export.selectors.selector import TensorView
from tests.selectors.one_score import build, exact_rows, layout, same


def _view(runs: tuple[int, ...], num_keep: int = 4, seed: int = 0) -> TensorView:
    is_visual = layout(*runs)
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(len(is_visual), 24, generator=random)
    return TensorView(is_visual=is_visual, num_keep=num_keep, hidden=hidden)


@pytest.mark.parametrize("runs", [(2, 7, 3), (1, 3, 2, 4, 1, 6, 2), (1, 9, 9), (0, 5, 1), (4, 6)])
@pytest.mark.parametrize("pivots", [(4, 4), (1, 0), (2, 3), (9, 1)])
def test_every_count(runs: tuple[int, ...], pivots: tuple[int, int]) -> None:
    for num_keep in range(1, sum(runs[1::2]) + 1):
        same("dart", _view(runs, num_keep), visual_pivots=pivots[0], text_pivots=pivots[1])


@pytest.mark.parametrize("runs", [(3, 63, 5), (1, 64, 2), (4, 40, 1, 60, 9)])
@pytest.mark.parametrize("share", [0.1, 0.5, 1])
def test_sizes(runs: tuple[int, ...], share: float) -> None:
    same("dart", _view(runs, int(sum(runs[1::2]) * share), seed=1))


def test_each_pivot_takes_what_is_least_like_it() -> None:
    """11 tokens: 2 visual pivots, and 9 for 4 pivots in turn, of which the first takes one more."""
    view = _view((3, 20, 1, 10, 4), 11)
    rows, norms = torch.where(view.is_visual)[0].tolist(), view.hidden.abs().sum(1)
    questions = [23, *range(34, 38)]
    visual = sorted(rows, key=lambda row: -norms[row])[:2]
    pivots = visual + sorted(questions, key=lambda row: -norms[row])[:2]
    pool, order = set(rows) - set(visual), visual
    for pivot, quota in zip(pivots, (3, 2, 2, 2), strict=True):
        likeness = torch.cosine_similarity(view.hidden.double(), view.hidden[pivot].double(), dim=1)
        taken = sorted(pool, key=lambda row: likeness[row])[:quota]
        pool -= set(taken)
        order = order + taken
    assert same("dart", view, visual_pivots=2, text_pivots=2).tolist() == order


def test_only_text_behind_the_first_visual_token_is_a_pivot() -> None:
    view = _view((5, 30, 2), 12)
    before = same("dart", view).tolist()
    view.hidden[:5] *= -100
    assert same("dart", view).tolist() == before
    view.hidden[36] *= -100
    assert same("dart", view).tolist() != before


@pytest.mark.parametrize("seed", range(4))
def test_equals_keep_their_order(seed: int) -> None:
    """All norms are equal, and many cosines."""
    view = _view((2, 15, 1, 15, 3))
    hidden = exact_rows(len(view.hidden), seed)
    hidden[4::3] = hidden[3:-1:3]
    for num_keep in range(1, 31):
        rows = same("dart", replace(view, hidden=hidden, num_keep=num_keep)).tolist()
        assert rows[:4] == [2, 3, 4, 5][:num_keep]


def test_nan_never_wins() -> None:
    view = _view((2, 10, 3))
    view.hidden[2], view.hidden[4], view.hidden[5, 3], view.hidden[13] = torch.nan, 0, torch.inf, torch.nan
    for num_keep in range(1, 11):
        rows = same("dart", replace(view, num_keep=num_keep)).tolist()
        assert num_keep > 7 or not {2, 4, 5} & set(rows)


def test_half_precision() -> None:
    view = _view((2, 20, 3), 9)
    same("dart", replace(view, hidden=view.hidden.half()))


@pytest.mark.trt
def test_an_engine_is_built(tmp_path: Path) -> None:
    built = build("dart", _view((2, 12, 3), 5), tmp_path)
    assert built["warnings"] == []
