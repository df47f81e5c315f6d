"""The ONNX bodies of the CAPA operators against plain NumPy."""

import numpy as np
import pytest

from tests.graph.one_node import run


def kept(scores: np.ndarray, num_keep: int, min_keep_per_image: int = 0) -> np.ndarray:
    inputs = [scores.astype(np.float32), np.array([num_keep])]
    return run("TopKKeep", inputs, min_keep_per_image=min_keep_per_image)


def reference_scores(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, weight: np.ndarray, scale: float
) -> np.ndarray:
    """|| sum_h A_h v W_O,h ||, one head and one token at a time, in FP64."""
    heads, groups, size = query.shape[1], key.shape[1], query.shape[-1]
    total = np.zeros((key.shape[2], weight.shape[0]))
    for head in range(heads):
        group = head // (heads // groups)
        logits = key[0, group].astype(np.float64) @ query[0, head, 0].astype(np.float64) * scale
        attention = np.exp(logits - logits.max())
        attention /= attention.sum()
        total += attention[:, None] * (value[0, group] @ weight[:, head * size : (head + 1) * size].T)
    return np.linalg.norm(total, axis=1)


@pytest.mark.parametrize(
    ("heads", "groups", "size", "tokens"), [(4, 4, 8, 7), (6, 2, 16, 63), (4, 1, 80, 33), (1, 1, 64, 1)]
)
def test_contribution_score_is_the_norm_of_the_sum_over_heads(heads: int, groups: int, size: int, tokens: int) -> None:
    rng = np.random.default_rng(tokens)
    query = rng.normal(size=(1, heads, 1, size)).astype(np.float32)
    key, value = (rng.normal(size=(1, groups, tokens, size)).astype(np.float32) for _ in range(2))
    weight = rng.normal(size=(24, heads * size)).astype(np.float32)
    text = np.array([0, tokens - 1][: min(tokens, 2)], dtype=np.int64)
    scores = run("ContributionScore", [query, key, value, weight, text], scale=size**-0.5)
    expected = reference_scores(query, key, value, weight, size**-0.5)
    visual = np.setdiff1d(np.arange(tokens), text)
    np.testing.assert_allclose(scores[visual], expected[visual], rtol=2e-5)
    assert np.isposinf(scores[text]).all()


def test_contribution_score_computes_half_inputs_in_fp32() -> None:
    rng = np.random.default_rng(0)
    query = rng.normal(size=(1, 2, 1, 16)).astype(np.float16)
    key = rng.normal(size=(1, 2, 40, 16)).astype(np.float16)
    value = rng.uniform(-6e4, 6e4, size=(1, 2, 40, 16)).astype(np.float16)
    weight = rng.normal(size=(32, 32)).astype(np.float16)
    text = np.array([39])
    scores = run("ContributionScore", [query, key, value, weight, text], scale=0.25)
    expected = reference_scores(query, key, value, weight.astype(np.float64), 0.25)
    assert scores.dtype == np.float32
    # Sums of squares reach 1e10: in half they would be infinite.
    np.testing.assert_allclose(scores[:39], expected[:39], rtol=1e-4)


def test_an_overflowed_score_never_ties_with_text() -> None:
    query = np.ones((1, 1, 1, 4), np.float32)
    key, value = np.zeros((1, 1, 3, 4), np.float32), np.full((1, 1, 3, 4), 3e38, np.float32)
    scores = run("ContributionScore", [query, key, value, np.ones((4, 4), np.float32), np.array([2])], scale=1.0)
    assert np.isfinite(scores[:2]).all()
    assert kept(scores, 1).tolist() == [2]


@pytest.mark.parametrize("num_keep", [0, 1, 5, 62, 63])
def test_topk_keeps_the_best_in_ascending_order(num_keep: int) -> None:
    scores = np.random.default_rng(1).normal(size=63)
    assert kept(scores, num_keep).tolist() == sorted(np.argsort(-scores, kind="stable")[:num_keep].tolist())


def test_topk_gives_ties_to_the_lowest_index() -> None:
    assert kept(np.zeros(9), 4).tolist() == [0, 1, 2, 3]
    assert kept(np.array([1, 3, 2, 3, 2, 3, 2.0]), 4).tolist() == [1, 2, 3, 5]
    assert kept(np.array([np.inf, 1, np.inf, 1, 1]), 3).tolist() == [0, 1, 2]


def test_topk_never_keeps_nan_before_a_number() -> None:
    scores = np.array([np.nan, 5, np.nan, 4, -np.inf, 9])
    assert kept(scores, 3).tolist() == [1, 3, 5]
    # NaN counts as the lowest there is, a tie with -inf.
    assert kept(scores, 5).tolist() == [0, 1, 2, 3, 5]


def test_topk_is_exact_beyond_the_limit_of_tensorrt() -> None:
    scores = np.random.default_rng(2).integers(0, 50, 5000).astype(np.float32)
    assert kept(scores, 4321).tolist() == sorted(np.argsort(-scores, kind="stable")[:4321].tolist())


TEXT = np.inf
THREE_IMAGES = np.array([TEXT, 9, 8, 7, TEXT, TEXT, 1, 3, 2, TEXT, 5, TEXT])
"""Images of 3, 3 and 1 tokens at rows 1, 6 and 10."""


@pytest.mark.parametrize(
    ("least", "num_visual", "rows"),
    [
        (0, 3, [1, 2, 3]),
        (1, 3, [1, 7, 10]),
        (1, 4, [1, 2, 7, 10]),
        # The one-token image cannot give two.
        (2, 5, [1, 2, 7, 8, 10]),
        (9, 7, [1, 2, 3, 6, 7, 8, 10]),
        # Too few for all: the best come first, and text before any.
        (1, 2, [1, 10]),
        (1, 0, []),
    ],
)
def test_topk_leaves_every_image_its_best_tokens(least: int, num_visual: int, rows: list[int]) -> None:
    text = np.flatnonzero(np.isinf(THREE_IMAGES)).tolist()
    assert kept(THREE_IMAGES, num_visual + len(text), least).tolist() == sorted(text + rows)


def test_an_image_without_any_score_still_keeps_its_share() -> None:
    scores = np.array([np.nan, np.nan, TEXT, 4, 5, TEXT])
    assert kept(scores, 4, 1).tolist() == [0, 2, 4, 5]


@pytest.mark.parametrize("seed", range(8))
def test_topk_with_a_share_per_image_equals_a_plain_sort(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 6, 200).astype(np.float32)
    scores[rng.random(200) < 0.1] = TEXT
    least, num_visual = 3, 90
    is_text = np.isinf(scores)
    image = np.cumsum(is_text)
    best_first = np.argsort(-scores, kind="stable")
    best_first = best_first[~is_text[best_first]].tolist()
    first = [
        row
        for row in best_first
        if sum(image[other] == image[row] for other in best_first[: best_first.index(row)]) < least
    ]
    rest = [row for row in best_first if row not in first]
    rows = (first + rest)[:num_visual]
    expected = sorted([*np.flatnonzero(is_text).tolist(), *rows])
    assert kept(scores, num_visual + int(is_text.sum()), least).tolist() == expected


def test_token_gather() -> None:
    rng = np.random.default_rng(3)
    shapes = [(5, 6), (1, 2, 5, 4), (1, 2, 5, 4), (1, 5, 2), (1, 5, 2)]
    tensors = [rng.normal(size=shape).astype(np.float16) for shape in shapes]
    rows = np.array([0, 2, 4])
    for tensor, axis, result in zip(tensors, (0, 2, 2, 1, 1), run("TokenGather", [*tensors, rows]), strict=True):
        np.testing.assert_array_equal(result, np.take(tensor, rows, axis=axis))


def test_visual_scale_replaces_text_rows_and_scales_the_rest() -> None:
    rng = np.random.default_rng(4)
    x, alpha, text = (rng.normal(size=shape).astype(np.float32) for shape in ((6, 8), (8,), (2, 8)))
    rows = np.array([1, 5])
    expected = x * alpha
    expected[rows] = text
    np.testing.assert_array_equal(run("VisualScale", [x, alpha, text, rows]), expected)
