"""Contributions with diversity, against marginal relevance as its definition reads."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from capa_export.selectors.selector import load_selector
from tests.selectors.decoder_view import decoder_view
from tests.selectors.one_score import Case, build, graph_scores, kept, layout, reference_scores, same


def by_definition(prompt: Case, balance: float, chunks: int, *, hidden: bool) -> list[int]:
    """Rows in the order chosen, one comparison at a time, in FP64."""
    assert prompt.attention is not None and prompt.value is not None and prompt.output_weight is not None
    weight = prompt.output_weight.double().numpy()
    written = []
    for token in range(len(prompt.is_visual)):
        heads = [
            prompt.attention[head, token].item()
            * prompt.value[head * len(prompt.value) // len(prompt.attention), token]
            for head in range(len(prompt.attention))
        ]
        written.append(weight @ torch.cat(heads).double().numpy())
    features = prompt.hidden.double().numpy() if hidden else written
    magnitude = [float(np.linalg.norm(row)) for row in written]

    def alike(a: int, b: int) -> float:
        return features[a] @ features[b] / np.linalg.norm(features[a]) / np.linalg.norm(features[b])

    left = torch.where(prompt.is_visual)[0].tolist()
    largest = max(magnitude[row] for row in left)
    chosen: list[int] = []
    for steps_left in range(chunks, 0, -1):
        values = {
            row: balance * magnitude[row] / largest
            - (1 - balance) * max((alike(row, other) for other in chosen), default=0)
            for row in left
        }
        size = int(np.ceil((prompt.num_keep - len(chosen)) / steps_left))
        best = sorted(left, key=lambda row: (-values[row], row))[:size]
        chosen += best
        left = [row for row in left if row not in best]
    return chosen


@pytest.mark.parametrize("runs", [(0, 63, 1), (3, 64, 2), (1, 40, 5, 60, 7), (2, 7, 1)])
@pytest.mark.parametrize("options", [{}, {"hidden": 1}, {"balance": 0.9, "chunks": 3}, {"chunks": 1}])
def test_graph_and_reference_choose_alike(runs: tuple[int, ...], options: dict[str, Any]) -> None:
    prompt = decoder_view(layout(*runs), sum(runs[1::2]) // 3, seed=len(runs))
    rows = same("capa-mmr", prompt, **options).tolist()
    settings = {"balance": 0.5, "chunks": 8, "hidden": 0, **options}
    assert rows == by_definition(prompt, settings["balance"], settings["chunks"], hidden=bool(settings["hidden"]))


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (4, 1)])
def test_grouped_heads(heads: int, kv_heads: int) -> None:
    same("capa-mmr", decoder_view(layout(2, 33, 3), 9, heads=heads, kv_heads=kv_heads))


@pytest.mark.parametrize("chunks", [1, 20])
def test_every_number_of_tokens(chunks: int) -> None:
    for num_keep in range(1, 13):
        prompt = decoder_view(layout(2, 5, 1, 7, 3), num_keep)
        assert same("capa-mmr", prompt, chunks=chunks).tolist() == by_definition(prompt, 0.5, chunks, hidden=False)


def test_magnitude_alone_is_capa() -> None:
    prompt = decoder_view(layout(2, 63, 3), 20)
    capa = set(kept(reference_scores("capa", prompt), prompt).tolist())
    assert set(same("capa-mmr", prompt, balance=1).tolist()) == capa
    assert set(same("capa-mmr", prompt, balance=0.5, hidden=1).tolist()) != capa


def test_of_two_alike_one_stays() -> None:
    prompt = decoder_view(layout(1, 12, 2), 6, seed=3)
    hidden = prompt.hidden.clone()
    hidden[7:13] = hidden[1:7]
    rows = same("capa-mmr", replace(prompt, hidden=hidden), hidden=1, balance=0.05, chunks=6)
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
    assert same("capa-mmr", constant).tolist() == [1, 2, 3, 4]


def test_nan_never_wins() -> None:
    prompt = decoder_view(layout(1, 10, 1), 9)
    assert prompt.value is not None
    value = prompt.value.clone()
    value[:, 4] = torch.nan
    for scores_of in (graph_scores, reference_scores):
        assert 4 not in kept(scores_of("capa-mmr", replace(prompt, value=value)), prompt)
    same("capa-mmr", replace(prompt, value=value))


def test_what_gets_no_attention_at_all_comes_last() -> None:
    prompt = decoder_view(layout(1, 10, 1), 9)
    assert prompt.key is not None and prompt.query is not None
    query, key = torch.ones_like(prompt.query), prompt.key / 10
    key[:, 4] = -50.0
    attention = torch.softmax(key.sum(-1).repeat_interleave(2, dim=0) / 4, dim=-1)
    assert (attention[:, 4] == 0).all()
    unseen = replace(prompt, query=query, key=key, attention=attention)
    assert 4 not in same("capa-mmr", unseen, chunks=9, balance=0.05)


def test_is_not_graded() -> None:
    assert not load_selector("capa-mmr").graded


@pytest.mark.trt
@pytest.mark.parametrize("hidden", [0, 1])
def test_builds(tmp_path: Path, hidden: int) -> None:
    assert build("capa-mmr", decoder_view(layout(1, 8, 2), 4), tmp_path, hidden=hidden)["layers"] > 0
