"""DivPrune: nodes against the reference, and both against the rule written out."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from capa_export.selectors.selector import TensorView
from tests.selectors.one_score import build, exact_rows, kept, layout, reference_scores, same


def _view(runs: tuple[int, ...], num_keep: int = 1, seed: int = 0) -> TensorView:
    is_visual = layout(*runs)
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(len(is_visual), 24, generator=random)
    return TensorView(is_visual=is_visual, num_keep=num_keep, hidden=hidden)


@pytest.mark.parametrize("runs", [(2, 7, 3), (1, 3, 2, 4, 1, 6, 2), (1, 1, 1), (0, 2, 1)])
def test_every_count(runs: tuple[int, ...]) -> None:
    for num_keep in range(1, sum(runs[1::2]) + 1):
        same("divprune", _view(runs, num_keep))


@pytest.mark.parametrize("runs", [(3, 63, 5), (1, 64, 2), (4, 40, 1, 60, 9)])
@pytest.mark.parametrize("share", [0.1, 0.5, 1])
def test_sizes(runs: tuple[int, ...], share: float) -> None:
    same("divprune", _view(runs, int(sum(runs[1::2]) * share), seed=1))


@pytest.mark.parametrize("seed", range(4))
def test_the_farthest_of_equals_is_the_first(seed: int) -> None:
    """Step by step, over whole numbers; every third token is one that was there before."""
    view = replace(_view((2, 9, 1, 12, 3)), num_keep=21)
    hidden = exact_rows(len(view.hidden), seed)
    hidden[::3] = hidden[1::3]
    view = replace(view, hidden=hidden)
    rows = torch.where(view.is_visual)[0].tolist()
    far = (16 - hidden @ hidden.T).tolist()
    order = [max(rows, key=lambda row: min(far[row][other] for other in rows if other != row))]
    while len(order) < len(rows):
        left = [row for row in rows if row not in order]
        order.append(max(left, key=lambda row: min(far[row][other] for other in order)))
    for num_keep in (1, 2, 5, 14, 21):
        assert same("divprune", replace(view, num_keep=num_keep)).tolist() == order[:num_keep]


def test_what_points_nowhere_comes_last() -> None:
    view = _view((1, 8, 1))
    view.hidden[2], view.hidden[4], view.hidden[5, 3] = torch.nan, 0, torch.inf
    clean = [row for row in range(1, 9) if row not in {2, 4, 5}]
    for num_keep in range(1, 9):
        rows = same("divprune", replace(view, num_keep=num_keep)).tolist()
        assert set(rows[:5]) <= set(clean)
        assert rows[5:] == [2, 4, 5][: max(0, num_keep - 5)]


def test_half_precision() -> None:
    view = _view((2, 20, 3), 9)
    same("divprune", replace(view, hidden=view.hidden.half()))


def test_text_and_length_do_not_count() -> None:
    view = _view((2, 12, 3), 5)
    order = kept(reference_scores("divprune", view), view)
    view.hidden[~view.is_visual] *= -3
    view.hidden[view.is_visual] *= torch.arange(1.0, 13)[:, None]
    assert same("divprune", view).tolist() == order.tolist()


@pytest.mark.trt
def test_an_engine_is_built(tmp_path: Path) -> None:
    built = build("divprune", _view((2, 12, 3), 5), tmp_path)
    assert built["warnings"] == []
