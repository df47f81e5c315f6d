"""The greedy MAP of a conditional DPP, against determinants."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from capa_export.selectors.selector import TensorView
from tests.selectors.one_score import build, graph_scores, kept, layout, reference_scores, same


def view(is_visual: torch.Tensor, num_keep: int, width: int = 24, seed: int = 0) -> TensorView:
    random = torch.Generator().manual_seed(seed)
    return TensorView(
        is_visual=is_visual, num_keep=num_keep, hidden=torch.randn(len(is_visual), width, generator=random)
    )


def kernel_of(prompt: TensorView) -> tuple[list[int], np.ndarray]:
    """Visual rows, and L among them, in FP64."""
    unit = prompt.hidden.double().numpy()
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    rows = np.flatnonzero(prompt.is_visual.numpy())
    text = [row for row in np.flatnonzero(~prompt.is_visual.numpy()) if row > rows[0]]
    relevance = (unit[rows] @ unit[text].T).mean(1)
    relevance = (relevance - relevance.min() + 1e-6) / (relevance.max() - relevance.min())
    return rows.tolist(), relevance[:, None] * (unit[rows] @ unit[rows].T) * relevance


def by_determinants(prompt: TensorView) -> list[int]:
    """Rows in the order chosen: each time that with which the determinant is largest."""
    rows, kernel = kernel_of(prompt)
    chosen: list[int] = []
    while len(chosen) < prompt.num_keep:
        left = [i for i in range(len(rows)) if i not in chosen]
        chosen.append(max(left, key=lambda i: np.linalg.det(kernel[np.ix_([*chosen, i], [*chosen, i])])))
    return [rows[i] for i in chosen]


@pytest.mark.parametrize("runs", [(0, 7, 2), (2, 12, 3), (1, 5, 2, 6, 1)])
def test_every_step_takes_the_largest_determinant(runs: tuple[int, ...]) -> None:
    for num_keep in range(1, sum(runs[1::2]) + 1):
        prompt = view(layout(*runs), num_keep, seed=num_keep)
        assert same("cdpruner", prompt).tolist() == by_determinants(prompt)


@pytest.mark.parametrize(("runs", "num_keep"), [((0, 63, 5), 21), ((3, 64, 2), 20), ((1, 40, 5, 60, 7), 12)])
def test_graph_and_reference_choose_alike(runs: tuple[int, ...], num_keep: int) -> None:
    prompt = view(layout(*runs), num_keep)
    assert same("cdpruner", prompt).tolist() == by_determinants(prompt)


@pytest.mark.parametrize("decay", [0.0, 0.05, 0.2])
@pytest.mark.parametrize("width", [16, 64])
def test_more_tokens_than_dimensions(decay: float, width: int) -> None:
    prompt = view(layout(2, 100, 9), 75, width=width)
    scaled = prompt.hidden * torch.exp(-decay * torch.arange(width))
    same("cdpruner", replace(prompt, hidden=scaled))


def test_of_duplicates_one_stays_until_nothing_else_does() -> None:
    prompt = view(layout(1, 12, 3), 6)
    hidden = prompt.hidden.clone()
    hidden[7:13] = hidden[1:7]
    rows = same("cdpruner", replace(prompt, hidden=hidden)).tolist()
    assert sorted((row - 1) % 6 for row in rows) == list(range(6))
    more = same("cdpruner", replace(prompt, hidden=hidden, num_keep=10)).tolist()
    assert sorted(more[:6]) == sorted(rows)


def test_what_others_explain_comes_by_relevance_and_then_from_the_lowest_row() -> None:
    hidden = torch.zeros(9, 2)
    hidden[0], hidden[1], hidden[2:8] = torch.tensor([0.0, 1.0]), torch.tensor([0.6, 0.8]), torch.tensor([1.0, 0.0])
    hidden[8] = torch.tensor([1.0, 1.0])
    hidden[5] = hidden[1]
    prompt = TensorView(is_visual=layout(0, 8, 1), num_keep=8, hidden=hidden)
    assert same("cdpruner", prompt).tolist() == [1, 2, 5, 0, 3, 4, 6, 7]


def test_equals_keep_the_lowest_rows() -> None:
    prompt = TensorView(is_visual=layout(1, 10, 1), num_keep=4, hidden=torch.ones(12, 4))
    assert same("cdpruner", prompt).tolist() == [1, 2, 3, 4]


def test_no_text_behind_the_picture_leaves_diversity_alone() -> None:
    prompt = view(layout(2, 20), 6)
    unit = torch.nn.functional.normalize(prompt.hidden[2:].double(), dim=-1).numpy()
    chosen = [0]
    while len(chosen) < 6:
        left = [i for i in range(20) if i not in chosen]
        chosen.append(max(left, key=lambda i: np.linalg.det(unit[[*chosen, i]] @ unit[[*chosen, i]].T)))
    assert same("cdpruner", prompt).tolist() == [2 + i for i in chosen]


def test_text_before_the_picture_does_not_count() -> None:
    prompt = view(layout(4, 30, 3), 8)
    other = prompt.hidden.clone()
    other[:4] = torch.randn(4, 24, generator=torch.Generator().manual_seed(9))
    assert same("cdpruner", replace(prompt, hidden=other)).tolist() == same("cdpruner", prompt).tolist()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.0])
def test_rows_without_a_direction_come_last(value: float) -> None:
    prompt = view(layout(1, 10, 2), 9)
    hidden = prompt.hidden.clone()
    hidden[4] = value
    for scores_of in (graph_scores, reference_scores):
        assert 4 not in kept(scores_of("cdpruner", replace(prompt, hidden=hidden)), prompt)
    assert same("cdpruner", replace(prompt, hidden=hidden, num_keep=10)).tolist()[-1] == 4


def test_text_that_is_nan_spoils_nothing() -> None:
    prompt = view(layout(1, 10, 2), 5)
    hidden = prompt.hidden.clone()
    hidden[11] = torch.nan
    same("cdpruner", replace(prompt, hidden=hidden))


@pytest.mark.trt
def test_builds(tmp_path: Path) -> None:
    assert build("cdpruner", view(layout(1, 8, 2), 4), tmp_path)["layers"] > 0
