"""Attention before rotation, over visual keys only, and the grid before all others."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from capa_export.selectors.selector import TensorView
from tests.selectors.decoder_view import HEAD_SIZE, decoder_view
from tests.selectors.one_score import build, graph_scores, kept, layout, reference_scores, same


def view(is_visual: torch.Tensor, num_keep: int, width: int = 8, **sizes: Any) -> TensorView:
    """Pictures of `width` columns each, one per run of visual tokens."""
    row = decoder_view(is_visual, num_keep, **sizes)
    grid, place = torch.full((2, len(is_visual)), -1), 0
    for token, visual in enumerate(is_visual):
        place = place + 1 if visual else 0
        if visual:
            grid[:, token] = torch.tensor([(place - 1) // width, (place - 1) % width])
    return TensorView(
        is_visual=is_visual,
        num_keep=num_keep,
        hidden=row.hidden,
        plain_query=row.query,
        plain_key=row.key,
        visual_grid=grid,
    )


@pytest.mark.parametrize("runs", [(0, 63, 1), (3, 64, 2), (1, 40, 5, 60, 7), (2, 7, 1)])
@pytest.mark.parametrize("options", [{}, {"grid": 0}, {"stride": 2}])
def test_graph_keeps_what_the_reference_keeps(runs: tuple[int, ...], options: dict[str, int]) -> None:
    same("feather", view(layout(*runs), 5), **options)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (4, 1)])
def test_grouped_heads(heads: int, kv_heads: int) -> None:
    same("feather", view(layout(2, 33, 3), 15, heads=heads, kv_heads=kv_heads))


def test_every_number_of_tokens() -> None:
    for num_keep in range(1, 13):
        assert len(same("feather", view(layout(2, 12, 3), num_keep, width=4))) == num_keep


def test_attention_is_softmax_over_visual_keys_alone() -> None:
    prompt = view(layout(3, 20, 4), 5)
    assert prompt.plain_query is not None and prompt.plain_key is not None
    expected = np.zeros(20)
    for head, query in enumerate(prompt.plain_query.double().numpy()):
        logits = prompt.plain_key[head // 2, 3:23].double().numpy() @ query / HEAD_SIZE**0.5
        expected += np.exp(logits) / np.exp(logits).sum() / 4
    np.testing.assert_allclose(graph_scores("feather", prompt, grid=0)[3:23], expected, rtol=1e-5)


@pytest.mark.parametrize("scores_of", [graph_scores, reference_scores])
def test_the_grid_comes_first_and_then_the_best_of_the_rest(scores_of: Any) -> None:
    prompt = view(layout(1, 49, 2), 20, width=7)
    attention = scores_of("feather", prompt, grid=0)
    grid = [1 + 7 * row + column for row in (0, 3, 6) for column in (0, 3, 6)]
    rest = [row for row in range(1, 50) if row not in grid]
    rest.sort(key=lambda row: -attention[row])
    assert set(kept(scores_of("feather", prompt), prompt).tolist()) == {*grid, *rest[:11]}


def test_with_as_many_tokens_as_their_union_has_it_is_the_union_of_grid_and_best() -> None:
    prompt = view(layout(1, 81, 2), 1, width=9)
    best = same("feather", replace(prompt, num_keep=24), grid=0).tolist()
    grid = [1 + 9 * row + column for row in (0, 3, 6) for column in (0, 3, 6)]
    union = {*best, *grid}
    assert set(same("feather", replace(prompt, num_keep=len(union))).tolist()) == union


def test_a_grid_token_that_gets_next_to_nothing_still_comes_first() -> None:
    prompt = view(layout(0, 9, 1), 1, width=3)
    assert prompt.plain_query is not None and prompt.plain_key is not None
    query = torch.ones_like(prompt.plain_query)
    key = torch.zeros_like(prompt.plain_key)
    # e^-200 is zero in FP32, and only row 0 is on the grid.
    key[:, 5] = 50.0
    assert same("feather", replace(prompt, plain_query=query, plain_key=key)).tolist() == [0]


def test_relative_leads_on_the_grid_are_those_of_attention() -> None:
    prompt = view(layout(0, 49, 1), 9, width=7)
    on_grid = [0, 3, 6, 21, 24, 27, 42, 45, 48]
    plain, lifted = graph_scores("feather", prompt, grid=0)[on_grid], graph_scores("feather", prompt)[on_grid]
    assert (lifted / 2.0**127).tolist() == plain.tolist()


def test_equal_attention_keeps_the_lowest_rows() -> None:
    prompt = view(layout(1, 10, 1), 4)
    assert prompt.plain_key is not None
    constant = replace(prompt, plain_key=torch.zeros_like(prompt.plain_key))
    assert same("feather", constant, grid=0).tolist() == [1, 2, 3, 4]


@pytest.mark.trt
def test_builds(tmp_path: Path) -> None:
    assert build("feather", view(layout(1, 8, 2), 4), tmp_path)["layers"] > 0
