"""VisPruner: nodes against the reference, and both against the paper's loop written out."""

from dataclasses import replace
from math import floor
from pathlib import Path

import pytest
import torch

from capa_export.selectors.selector import TensorView
from capa_export.selectors.vispruner import _EXTRA_ROUNDS, _PER_ROUND, _fraction
from tests.selectors.one_score import build, exact_rows, graph_scores, layout, same


def _view(runs: tuple[int, ...], num_keep: int = 1, seed: int = 0) -> TensorView:
    is_visual = layout(*runs)
    random = torch.Generator().manual_seed(seed)
    count = len(is_visual)
    return TensorView(
        is_visual=is_visual,
        num_keep=num_keep,
        hidden=torch.zeros(count, 4),
        visual_saliency=torch.rand(count, generator=random) * is_visual,
        visual_features=torch.randn(count, 24, generator=random) * is_visual[:, None],
    )


def _paper(view: TensorView, important: float) -> tuple[list[int], list[int]]:
    """Rows that stay for their saliency and rows that are left, for as long as the lists are even."""
    assert view.visual_saliency is not None and view.visual_features is not None
    saliency, features = view.visual_saliency.tolist(), view.visual_features.double()
    cosine = torch.nn.functional.normalize(features, dim=1)
    cosine = (cosine @ cosine.T).tolist()
    rows = sorted(torch.where(view.is_visual)[0].tolist(), key=lambda row: -saliency[row])
    num_important = int(view.num_keep * important)
    num_diverse = view.num_keep - num_important
    left = rows[num_important:]
    while len(left) > num_diverse:
        first, second = left[0::2], left[1::2]
        count = min(8, len(left) - num_diverse)
        assert len(first) == len(second) >= count
        likeness = {row: max(cosine[row][other] for other in second) for row in first}
        left = sorted(first, key=lambda row: -likeness[row])[count:] + second
    return rows[:num_important], left


@pytest.mark.parametrize("runs", [(2, 7, 3), (1, 3, 2, 4, 1, 13, 2), (1, 1, 1), (0, 2, 1)])
@pytest.mark.parametrize("important", [0.5, 0, 1, 0.29])
def test_every_count(runs: tuple[int, ...], important: float) -> None:
    for num_keep in range(1, sum(runs[1::2]) + 1):
        same("vispruner", _view(runs, num_keep), important=important)


@pytest.mark.parametrize("runs", [(3, 63, 5), (1, 64, 2), (4, 40, 1, 60, 9)])
@pytest.mark.parametrize("share", [0.05, 0.25, 0.5, 1])
def test_sizes(runs: tuple[int, ...], share: float) -> None:
    same("vispruner", _view(runs, int(sum(runs[1::2]) * share), seed=1))


@pytest.mark.parametrize(("num_keep", "important"), [(32, 0.5), (16, 0.5), (40, 0.25), (12, 0.5), (20, 0)])
def test_even_lists_are_the_papers(num_keep: int, important: float) -> None:
    for seed in range(3):
        view = _view((3, 30, 2, 34, 1), num_keep, seed)
        important_rows, left = _paper(view, important)
        assert same("vispruner", view, important=important).tolist() == important_rows + left


def test_a_whole_picture_of_llava() -> None:
    view = _view((35, 576, 64), 144)
    features = exact_rows(len(view.hidden)) * view.is_visual[:, None]
    important_rows, left = _paper(replace(view, visual_features=features), 0.5)
    assert same("vispruner", replace(view, visual_features=features)).tolist() == important_rows + left


@pytest.mark.parametrize("seed", range(4))
def test_equals_keep_their_order(seed: int) -> None:
    view = _view((2, 25, 1, 25, 3))
    saliency = (view.visual_saliency * 5).round()
    features = exact_rows(len(view.hidden), seed)
    features[4::3] = features[3:-1:3]
    for num_keep in (12, 24, 36):
        tied = replace(view, num_keep=num_keep, visual_saliency=saliency, visual_features=features)
        important_rows, left = _paper(tied, 0.5)
        assert same("vispruner", tied).tolist() == important_rows + left
    for num_keep in range(1, 51):
        same("vispruner", replace(tied, num_keep=num_keep), important=0.3)


def test_the_odd_one_may_be_removed() -> None:
    """Of three, the last is nearly the second."""
    view = replace(
        _view((1, 3, 1), 2),
        visual_saliency=torch.tensor([0, 0.9, 0.8, 0.7, 0]),
        visual_features=torch.tensor([[0, 0], [1, 0], [0, 1], [0.6, 0.8], [0, 0]]),
    )
    assert same("vispruner", view, important=0).tolist() == [1, 2]


def test_the_rounds_are_enough() -> None:
    """A list loses no more than every other token in a round."""
    for num_diverse in range(1, 200):
        for to_remove in range(200):
            left, rounds = num_diverse + to_remove, 0
            while left > num_diverse:
                left -= min(_PER_ROUND, left - num_diverse, (left + 1) // 2)
                rounds += 1
            assert rounds <= -(-to_remove // _PER_ROUND) + _EXTRA_ROUNDS


def test_nan_never_wins() -> None:
    view = _view((1, 9, 1))
    view.visual_saliency[2] = torch.nan
    assert 2 not in same("vispruner", replace(view, num_keep=8), important=1)
    view.visual_saliency[2] = 0.9
    view.visual_features[2], view.visual_features[5] = torch.nan, 0
    for num_keep in range(1, 10):
        same("vispruner", replace(view, num_keep=num_keep))


def test_half_precision() -> None:
    view = _view((2, 20, 3), 9)
    same("vispruner", replace(view, visual_features=view.visual_features.half()))


def test_the_fraction_is_rounded_down_as_written() -> None:
    for num_keep in range(1, 3000):
        for important in (0, 0.25, 0.5, 0.75, 1):
            assert floor(num_keep * _fraction(important)) == int(num_keep * important)
    # 0.29 * 100 is 28.999999999999996.
    assert floor(100 * _fraction(0.29)) == 29
    assert _fraction(0.1 + 0.2) == _fraction(0.3), "or its denominator would not fit into 64 bits"
    view = _view((1, 120, 1), 100)
    salient = view.visual_saliency.argsort(descending=True)[:29]
    assert graph_scores("vispruner", view, important=0.29)[salient].tolist() == list(range(100, 71, -1))


@pytest.mark.trt
def test_an_engine_is_built(tmp_path: Path) -> None:
    built = build("vispruner", _view((2, 12, 3), 5), tmp_path)
    assert [warning for warning in built["warnings"] if "hidden_TD" not in warning] == []
