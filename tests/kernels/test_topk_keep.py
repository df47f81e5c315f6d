"""The kernels of TopKKeep against their reference and against the ONNX body."""

import pytest
import torch

from capa_export.kernels.execute import execute
from capa_export.kernels.topk_keep import OPERATOR, reference
from tests.graph.one_node import run

TEXT = torch.inf
NAN = torch.nan
LARGEST = torch.finfo(torch.float32).max
DENORMAL = 1e-45


def kernels(scores: torch.Tensor, num_keep: int, least: int) -> torch.Tensor:
    """What the kernels keep, equal to the reference."""
    inputs = {"scores": scores, "num_keep": torch.tensor([num_keep])}
    kept = execute(OPERATOR, inputs, min_keep_per_image=least)["kept"]
    assert kept.dtype == torch.int64
    assert kept.tolist() == reference(**inputs, min_keep_per_image=least).tolist()
    return kept


def checked(scores: torch.Tensor, num_keep: int, least: int = 0) -> list[list[int]]:
    """What the kernels keep, equal to the reference and, prompt by prompt, to the ONNX body."""
    kept = kernels(scores, num_keep, least).tolist()
    for row, scores_T in zip(kept, scores, strict=True):
        inputs = [scores_T.numpy(), torch.tensor([num_keep]).numpy()]
        assert row == run("TopKKeep", inputs, min_keep_per_image=least).tolist()
    return kept


def prompts(tokens: int, batch: int = 1, text: float = 0.1, levels: int = 6, seed: int = 0) -> torch.Tensor:
    """Scores with many ties and some of every special value, text anywhere."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-levels, levels, (batch, tokens), generator=generator) / 2
    special = torch.tensor([NAN, -torch.inf, LARGEST, -LARGEST, DENORMAL, -DENORMAL, -0.0, 0.0])
    of_special = special[torch.randint(len(special), scores.shape, generator=generator)]
    scores = torch.where(torch.rand(scores.shape, generator=generator) < 0.3, of_special, scores)
    return scores.masked_fill(torch.rand(scores.shape, generator=generator) < text, TEXT)


@pytest.mark.parametrize(("tokens", "least"), [(1, 0), (1, 1), (32, 1), (33, 3), (63, 0), (63, 3), (300, 3), (1000, 0)])
def test_every_number_of_tokens(tokens: int, least: int) -> None:
    scores = prompts(tokens, seed=tokens)
    num_text = int(scores.isposinf().sum())
    for num_keep in {1, num_text, (num_text + tokens) // 2, tokens}:
        assert len(checked(scores, num_keep, least)[0]) == num_keep


@pytest.mark.parametrize("least", [0, 1])
@pytest.mark.parametrize(
    "scores",
    [
        [0.0] * 40,
        [NAN] * 40,
        [-torch.inf] * 40,
        [NAN, -torch.inf] * 20,
        [LARGEST] * 40,
        [TEXT] * 40,
        [-0.0, 0.0] * 20,
        [DENORMAL, -DENORMAL, 0.0, -0.0, 2 * DENORMAL] * 8,
        [LARGEST, -LARGEST, TEXT, -torch.inf, NAN] * 8,
    ],
    ids=["zero", "nan", "-inf", "nan and -inf", "largest", "text", "zeros", "denormals", "extremes"],
)
def test_ties_and_special_values(scores: list[float], least: int) -> None:
    for num_keep in (0, 13, 40):
        checked(torch.tensor([scores]), num_keep, least)


def test_ties_go_to_the_lowest_position() -> None:
    assert checked(torch.tensor([[1, 3, 2, 3, 2, 3, 2.0]]), 4) == [[1, 2, 3, 5]]
    assert checked(torch.tensor([[0.0, -0.0, DENORMAL, -0.0]]), 3) == [[0, 1, 2]]
    assert checked(torch.tensor([[NAN, -torch.inf, NAN, -LARGEST]]), 3) == [[0, 1, 3]]


@pytest.mark.parametrize("least", [1, 3, 2**31 - 1])
@pytest.mark.parametrize(
    "scores",
    [
        [5, 1, 9, 9, 3, 7],
        [TEXT, 9, 8, 7, TEXT, TEXT, 1, 3, 2, TEXT, 5, TEXT],
        [NAN, NAN, TEXT, 4, 5, TEXT],
        [2, 2, TEXT, 2, 2, 2, TEXT, 2],
    ],
    ids=["no text", "images of 3, 3 and 1", "without a score", "all equal"],
)
def test_images_keep_their_best(scores: list[float], least: int) -> None:
    for num_keep in range(1, len(scores) + 1, 2):
        checked(torch.tensor([scores], dtype=torch.float32), num_keep, least)


@pytest.mark.parametrize("first_text", [95, 96, 127, 128, 159, 160, 161])
def test_images_may_start_and_end_anywhere_in_a_block(first_text: int) -> None:
    scores = prompts(400, text=0, seed=first_text)
    scores[:, [first_text, first_text + 1, first_text + 130]] = TEXT
    kept = checked(scores, 3 + 4 * 2, 2)[0]
    edges = torch.tensor([first_text, first_text + 1, first_text + 130])
    images = torch.bucketize(torch.tensor(kept), edges, right=True)
    # Behind its text every image has its two, the empty one none; two are left for the best of the rest.
    assert [int((images == image).sum()) - bool(image) >= 2 * (image != 1) for image in range(4)] == [True] * 4


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.exhaustive) for seed in range(2, 6))])
def test_random_prompts(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    for case in range(5):
        tokens = draw(1, 140)
        text = (0, 0.03, 0.2, 1)[draw(0, 3)]
        # Two prompts whose text and images stand in different places.
        scores = prompts(tokens, batch=2, text=text, levels=draw(1, 50), seed=100 * seed + case)
        checked(scores, draw(0, tokens), draw(0, 4))


def test_more_tokens_than_one_block_of_the_search() -> None:
    scores = prompts(4096 + 63, text=0.01)
    for num_keep in (4097, 4096 + 63):
        kernels(scores, num_keep, 0)


@pytest.mark.slow
@pytest.mark.parametrize(("num_visual", "num_keep", "least"), [(16_384, 8000, 0), (4_200, 4_000, 3)])
def test_a_long_prompt(num_visual: int, num_keep: int, least: int) -> None:
    """The T x T matrices of the ONNX body would take gigabytes, and the interpreter minutes for a share in 16,384."""
    tokens = num_visual + 100
    scores = prompts(tokens, text=0, levels=2000)
    scores[:, torch.randperm(tokens, generator=torch.Generator().manual_seed(1))[:100]] = TEXT
    kernels(scores, num_keep, least)
