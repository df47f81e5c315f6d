"""AdaFV-style: nodes against the reference, the split, and what fills the gap."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from capa_export.selectors.selector import TensorView
from tests.selectors.one_score import build, exact_rows, layout, same


def _view(runs: tuple[int, ...], num_keep: int = 1, seed: int = 0) -> TensorView:
    is_visual = layout(*runs)
    random = torch.Generator().manual_seed(seed)
    count = len(is_visual)
    return TensorView(
        is_visual=is_visual,
        num_keep=num_keep,
        hidden=torch.randn(count, 24, generator=random),
        visual_saliency=torch.rand(count, generator=random) * is_visual,
    )


@pytest.mark.parametrize("runs", [(2, 7, 3), (1, 3, 2, 4, 1, 6, 2), (1, 1, 1), (0, 2, 1), (3, 8)])
@pytest.mark.parametrize("temperature", [0.1, 0.01, 1])
def test_every_count(runs: tuple[int, ...], temperature: float) -> None:
    for num_keep in range(1, sum(runs[1::2]) + 1):
        same("adafv-style", _view(runs, num_keep), temperature=temperature)


@pytest.mark.parametrize("runs", [(3, 63, 5), (1, 64, 2), (4, 40, 1, 60, 9)])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 1])
def test_sizes(runs: tuple[int, ...], share: float) -> None:
    same("adafv-style", _view(runs, int(sum(runs[1::2]) * share), seed=1))


def _pointing(likeness: list[float]) -> torch.Tensor:
    """Embeddings of visual tokens with these cosines to the one text token, which comes last."""
    cosine = torch.tensor([*likeness, 1])
    return torch.stack([cosine, (1 - cosine**2).sqrt()], dim=1)


def test_the_split_follows_the_masses() -> None:
    """One token is salient, and three are like the question: one by the one, three by the other."""
    view = TensorView(
        is_visual=layout(0, 8, 1),
        num_keep=4,
        hidden=_pointing([0, 0, 0, 0, 0, 0.9, 0.9, 0.9]),
        visual_saliency=torch.tensor([0.01, 0.9, 0.02, 0.03, 0.01, 0, 0, 0, 0]),
    )
    assert set(same("adafv-style", view).tolist()) == {1, 5, 6, 7}


def test_the_mixture_fills_up() -> None:
    """Masses make it 1 and 3 by saliency, 1 again by likeness; 5 is third of either, and 2 second of one."""
    view = TensorView(
        is_visual=layout(0, 6, 1),
        num_keep=3,
        hidden=_pointing([0.2, 0.9, 0.8, 0.1, 0.3, 0.78]),
        visual_saliency=torch.tensor([0.02, 0.5, 0.01, 0.22, 0.03, 0.21, 0]),
    )
    assert same("adafv-style", view).tolist() == [1, 3, 5]


@pytest.mark.parametrize("seed", range(4))
def test_equals_keep_their_order(seed: int) -> None:
    """Distinct masses, as their products must not tie; equal tokens within them."""
    view = _view((2, 16, 1, 16, 3), seed=seed)
    hidden = exact_rows(len(view.hidden), seed)
    hidden[4::3] = hidden[3:-1:3]
    saliency = view.visual_saliency.clone()
    saliency[4::3] = saliency[3:-1:3]
    for num_keep in range(1, 33):
        same("adafv-style", replace(view, hidden=hidden, visual_saliency=saliency, num_keep=num_keep))


def test_nothing_to_go_by() -> None:
    """No saliency, no question, and neither: the first tokens."""
    view = _view((1, 8, 2), 4)
    same("adafv-style", replace(view, visual_saliency=torch.zeros(11)))
    blind = _view((3, 8), 4)
    same("adafv-style", blind)
    assert same("adafv-style", replace(blind, visual_saliency=torch.zeros(11))).tolist() == [3, 4, 5, 6]


def test_nan_never_wins() -> None:
    view = _view((2, 10, 3))
    view.hidden[2], view.hidden[4], view.hidden[5, 3], view.hidden[13] = torch.nan, 0, torch.inf, torch.nan
    view.visual_saliency[[2, 4, 5]] = torch.tensor([torch.nan, torch.nan, torch.inf])
    for num_keep in range(1, 11):
        rows = same("adafv-style", replace(view, num_keep=num_keep)).tolist()
        assert num_keep > 7 or not {2, 4, 5} & set(rows)


def test_a_text_token_without_direction_is_no_question() -> None:
    """All are unlike the one that is left, some more than others."""
    hidden = torch.cat([_pointing([-0.9, -0.8, -0.1, -0.9, -0.9]), torch.zeros(1, 2)])
    saliency = torch.tensor([0.5, 0.2, 0.05, 0.05, 0.2, 0, 0])
    view = TensorView(is_visual=layout(0, 5, 2), num_keep=2, hidden=hidden, visual_saliency=saliency)
    assert same("adafv-style", view).tolist() == [2, 0]


def test_half_precision() -> None:
    view = _view((2, 20, 3), 9)
    same("adafv-style", replace(view, hidden=view.hidden.half()))


@pytest.mark.trt
def test_an_engine_is_built(tmp_path: Path) -> None:
    built = build("adafv-style", _view((2, 12, 3), 5), tmp_path)
    assert built["warnings"] == []
