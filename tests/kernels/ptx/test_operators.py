"""Every operator, run from the PTX that a GPU would get, against its reference."""

from types import ModuleType

import pytest
import torch

from capa_export.config.plugins import HEAD_SIZES
from capa_export.kernels import contribution_score, token_gather, topk_keep, visual_scale
from tests.kernels.ptx.run import outputs_of
from tests.kernels.test_contribution_score import case as score_case
from tests.kernels.test_token_gather import bits as gather_bits
from tests.kernels.test_topk_keep import prompts
from tests.kernels.test_visual_scale import case as scale_case
from tests.products import once_each

NAMES: dict[object, str] = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
REALS = pytest.mark.parametrize("real", NAMES, ids=NAMES.get)
TEXT = torch.inf

RTOL = 4e-6
"""The order of FP32 sums, and in FP32 three products of TF32 for one; products of halves are exact."""


def check(module: ModuleType, inputs: dict[str, torch.Tensor], rtol: float = 0, **attributes: float) -> None:
    """That the outputs equal the reference's, bit by bit unless `rtol` says otherwise."""
    found = list(outputs_of(module.OPERATOR, inputs, **attributes).values())
    expected = module.reference(**inputs, **attributes)
    for one, other in zip(found, expected if isinstance(expected, tuple) else (expected,), strict=True):
        if rtol:
            torch.testing.assert_close(one, other, rtol=rtol, atol=0, equal_nan=True)
        else:
            assert torch.equal(one.view(torch.uint8), other.contiguous().view(torch.uint8))


def check_score(inputs: dict[str, torch.Tensor], scale: float = 0.125) -> None:
    check(contribution_score, inputs, RTOL, scale=scale)


@pytest.mark.parametrize(("head_size", "real"), once_each(HEAD_SIZES, NAMES), ids=NAMES.get)
def test_contribution_score_of_every_head_size(head_size: int, real: torch.dtype) -> None:
    check_score(score_case(4, 2, head_size, tokens=45, hidden_size=144, num_text=3, real=real))


# Blocks are of 32 to 128 tokens and of 128 columns.
@REALS
@pytest.mark.parametrize(
    ("tokens", "num_text"), [(1, 0), (1, 1), (2, 1), (129, 0), (70, 70)], ids=["visual", "text", "both", "odd", "all"]
)
def test_contribution_score_of_odd_prompts(tokens: int, num_text: int, real: torch.dtype) -> None:
    check_score(score_case(1, 1, 32, tokens=tokens, hidden_size=16, num_text=num_text, real=real))


@REALS
def test_contribution_score_of_a_batch(real: torch.dtype) -> None:
    check_score(score_case(6, 2, 32, tokens=33, hidden_size=32, batch=2, num_text=17, real=real))


@REALS
@pytest.mark.parametrize("name", ["query", "key", "value", "output_weight"])
def test_contribution_score_of_what_is_not_finite(name: str, real: torch.dtype) -> None:
    inputs = score_case(2, 1, 32, tokens=40, hidden_size=16, real=real)
    inputs[name].view(-1)[37] = torch.inf
    check_score(inputs)


# A block is of 32 tokens; a tile, of 128.
@pytest.mark.parametrize("least", [0, 1])
@pytest.mark.parametrize(("tokens", "num_keep"), [(1, 0), (1, 1), (33, 1), (33, 33), (200, 77)])
def test_topk_keep_of_every_number(tokens: int, num_keep: int, least: int) -> None:
    inputs = {"scores": prompts(tokens, batch=2, seed=tokens), "num_keep": torch.tensor([num_keep])}
    check(topk_keep, inputs, min_keep_per_image=least)


@pytest.mark.parametrize(
    "scores", [[0.0] * 40, [torch.nan] * 40, [TEXT] * 40, [0.0, -0.0] * 20, [TEXT, 1, -TEXT, 9] * 10]
)
def test_topk_keep_of_ties_and_special_values(scores: list[float]) -> None:
    check(topk_keep, {"scores": torch.tensor([scores]), "num_keep": torch.tensor([13])}, min_keep_per_image=1)


def test_topk_keep_of_one_visual_token_among_text() -> None:
    scores = torch.full((1, 70), TEXT)
    scores[0, 41] = 0.5
    for num_keep in (69, 70):
        check(topk_keep, {"scores": scores, "num_keep": torch.tensor([num_keep])}, min_keep_per_image=0)


@pytest.mark.parametrize("tokens", [1, 33])
def test_topk_keep_of_more_than_there_are_repeats_the_last(tokens: int) -> None:
    inputs = {"scores": prompts(tokens, seed=tokens), "num_keep": torch.tensor([tokens + 3])}
    check(topk_keep, inputs, min_keep_per_image=0)
    kept = outputs_of(topk_keep.OPERATOR, inputs, min_keep_per_image=0)["kept"]
    assert kept.tolist() == [[*range(tokens), *[tokens - 1] * 3]]


@REALS
@pytest.mark.parametrize(
    ("tokens", "kept"), [(1, [0]), (20, []), (45, range(45)), (45, [44]), (33, [0, 1, 7, 15, 16, 31, 32])], ids=str
)
@pytest.mark.parametrize("head_size", [32, 80])
def test_token_gather_of_every_number(head_size: int, tokens: int, kept: list[int], real: torch.dtype) -> None:
    inputs = gather_bits(1, tokens, 48, 2, head_size, head_size // 2)
    check(token_gather, as_reals(inputs, real) | {"kept": torch.tensor([list(kept)], dtype=torch.int64)})


@REALS
@pytest.mark.parametrize("head_size", [64, 96, 128, 144])
def test_token_gather_of_large_heads(head_size: int, real: torch.dtype) -> None:
    inputs = gather_bits(2, 33, 272, 1, head_size, head_size)
    check(token_gather, as_reals(inputs, real) | {"kept": torch.tensor([[0, 1, 7, 15, 32], [5, 6, 9, 10, 11]])})


def as_reals(inputs: dict[str, torch.Tensor], real: torch.dtype) -> dict[str, torch.Tensor]:
    if real == torch.float32:
        return {name: (x.to(torch.int32) * 0x10001).view(real) for name, x in inputs.items()}
    return {name: x.view(real) for name, x in inputs.items()}


# A block is of 4 tokens and 1024 columns; text is searched 64 rows at a time.
@REALS
@pytest.mark.parametrize(
    ("tokens", "num_text", "hidden_size", "batch"),
    [(1, 0, 16, 1), (1, 1, 16, 1), (2, 1, 1040, 1), (9, 5, 48, 2), (70, 66, 16, 1), (7, 7, 48, 1)],
)
def test_visual_scale(tokens: int, num_text: int, hidden_size: int, batch: int, real: torch.dtype) -> None:
    check(visual_scale, scale_case(tokens, hidden_size, batch, num_text, real))
