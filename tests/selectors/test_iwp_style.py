"""Tokens as rank-1 updates, against their outer products and marginal relevance as its definition reads."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.selectors.decoder_view import HEAD_SIZE, decoder_view
from tests.selectors.one_score import Case, build, graph_scores, kept, layout, reference_scores, same


def by_definition(prompt: Case, balance: float, chunks: int) -> list[int]:
    """Rows in the order chosen, one comparison at a time, in FP64."""
    assert prompt.attention is not None and prompt.key is not None and prompt.value is not None
    attention, key, value = (x.double().numpy() for x in (prompt.attention, prompt.key, prompt.value))
    group = len(attention) // len(key)

    def magnitude(row: int) -> float:
        sizes = [attention[head, row] * np.linalg.norm(value[head // group, row]) for head in range(len(attention))]
        return float(np.mean(sizes))

    def alike(a: int, b: int) -> float:
        """<phi(k_a), phi(k_b)> of softmax's normed feature map times that of the normed values."""
        products = []
        for head in range(len(key)):
            dots = (key[head, a] @ key[head, b], key[head, a] @ key[head, a], key[head, b] @ key[head, b])
            exponents = np.array(dots) / HEAD_SIZE**0.5
            kernel = np.exp(exponents[0] - (exponents[1] + exponents[2]) / 2)
            norms = np.linalg.norm(value[head, a]) * np.linalg.norm(value[head, b])
            products.append(kernel * (value[head, a] @ value[head, b]) / norms)
        return float(np.mean(products))

    left = torch.where(prompt.is_visual)[0].tolist()
    largest = max(magnitude(row) for row in left)
    chosen: list[int] = []
    for steps_left in range(chunks, 0, -1):
        values = {
            row: balance * magnitude(row) / largest
            - (1 - balance) * max((alike(row, other) for other in chosen), default=0)
            for row in left
        }
        size = int(np.ceil((prompt.num_keep - len(chosen)) / steps_left))
        best = sorted(left, key=lambda row: (-values[row], row))[:size]
        chosen += best
        left = [row for row in left if row not in best]
    return chosen


def close_keys(prompt: Case) -> Case:
    """Keys near each other, so that duplication is not all but zero."""
    assert prompt.key is not None and prompt.query is not None
    key = prompt.key / 4
    per_head = key.repeat_interleave(len(prompt.query) // len(key), dim=0)
    attention = torch.softmax((per_head @ prompt.query[:, :, None])[..., 0] / HEAD_SIZE**0.5, dim=-1)
    return replace(prompt, key=key, attention=attention)


@pytest.mark.parametrize("runs", [(0, 63, 1), (3, 64, 2), (1, 40, 5, 60, 7), (2, 7, 1)])
@pytest.mark.parametrize("options", [{}, {"balance": 0.1, "chunks": 3}, {"chunks": 1}])
def test_graph_and_reference_choose_alike(runs: tuple[int, ...], options: dict[str, Any]) -> None:
    prompt = close_keys(decoder_view(layout(*runs), sum(runs[1::2]) // 3, seed=len(runs)))
    settings = {"balance": 0.5, "chunks": 8, **options}
    assert same("iwp-style", prompt, **options).tolist() == by_definition(prompt, **settings)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (4, 1)])
def test_grouped_heads(heads: int, kv_heads: int) -> None:
    prompt = close_keys(decoder_view(layout(2, 33, 3), 9, heads=heads, kv_heads=kv_heads))
    assert same("iwp-style", prompt).tolist() == by_definition(prompt, 0.5, 8)


def test_every_number_of_tokens() -> None:
    for num_keep in range(1, 13):
        prompt = close_keys(decoder_view(layout(2, 5, 1, 7, 3), num_keep))
        assert same("iwp-style", prompt, chunks=20).tolist() == by_definition(prompt, 0.5, 20)


def test_of_two_equal_updates_one_stays() -> None:
    prompt = decoder_view(layout(1, 12, 2), 6, seed=3)
    assert prompt.key is not None and prompt.value is not None and prompt.attention is not None
    key, value, attention = prompt.key.clone(), prompt.value.clone(), prompt.attention.clone()
    key[:, 7:13], value[:, 7:13] = key[:, 1:7], value[:, 1:7]
    attention[:, 7:13] = attention[:, 1:7]
    attention /= attention.sum(-1, keepdim=True)
    rows = same("iwp-style", replace(prompt, key=key, value=value, attention=attention), balance=0.05, chunks=6)
    assert sorted((row - 1) % 6 for row in rows.tolist()) == list(range(6))


def test_equals_keep_the_lowest_rows() -> None:
    prompt = decoder_view(layout(1, 10, 1), 4)
    assert prompt.key is not None and prompt.value is not None and prompt.attention is not None
    constant = replace(
        prompt,
        key=torch.zeros_like(prompt.key),
        value=torch.ones_like(prompt.value),
        attention=torch.full_like(prompt.attention, 1 / 12),
    )
    assert same("iwp-style", constant).tolist() == [1, 2, 3, 4]


def test_nan_never_wins() -> None:
    prompt = decoder_view(layout(1, 10, 1), 9)
    assert prompt.value is not None
    value = prompt.value.clone()
    value[:, 4] = torch.nan
    for scores_of in (graph_scores, reference_scores):
        assert 4 not in kept(scores_of("iwp-style", replace(prompt, value=value)), prompt)
    same("iwp-style", replace(prompt, value=value))


@pytest.mark.trt
def test_builds(tmp_path: Path) -> None:
    assert build("iwp-style", decoder_view(layout(1, 8, 2), 4), tmp_path)["layers"] > 0
