"""The kernels of ContributionScore against their reference and against the ONNX body."""

from typing import Any

import pytest
import torch

from capa_export.kernels.contribution_score import OPERATOR, reference
from capa_export.kernels.execute import execute
from tests.graph.test_functions import run

REALS = pytest.mark.parametrize("real", [torch.float16, torch.bfloat16, torch.float32], ids=["fp16", "bf16", "fp32"])
TEXT = torch.inf
LARGEST = torch.finfo(torch.float32).max

RTOL = 4e-6
"""For the halves, whose products are exact in FP32: what is left is the order of FP32 sums: kernel and
reference stay within 1.1e-6 of FP64 on such shapes."""


def case(
    heads: int = 2,
    kv_heads: int = 1,
    head_size: int = 32,
    tokens: int = 63,
    hidden_size: int = 48,
    batch: int = 1,
    num_text: int = 2,
    real: torch.dtype = torch.float16,
) -> dict[str, torch.Tensor]:
    """Random inputs, text spread over the prompt; the last prompt of a batch has one text token less."""
    generator = torch.Generator().manual_seed(heads * tokens + head_size)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(real)

    order = torch.stack([torch.randperm(tokens, generator=generator) for _ in range(batch)])
    text = order[:, :num_text].sort().values
    if batch > 1 and num_text:
        text[-1, -1] = -1
    return {
        "query": normal(batch, heads, 1, head_size),
        "key": normal(batch, kv_heads, tokens, head_size),
        "value": normal(batch, kv_heads, tokens, head_size),
        "output_weight": normal(hidden_size, heads * head_size),
        "text_positions": text,
    }


def checked(inputs: dict[str, torch.Tensor], scale: float = 0.125) -> torch.Tensor:
    """The scores, equal to the reference's, and to those of the ONNX body prompt by prompt."""
    scores = execute(OPERATOR, inputs, scale=scale)["scores"]
    expected = reference(**inputs, scale=scale)
    torch.testing.assert_close(scores, expected, rtol=RTOL, atol=0, equal_nan=True)
    for row, positions in enumerate(inputs["text_positions"]):
        batched = [inputs[name][row : row + 1] for name in ("query", "key", "value")]
        # In FP32, which the body computes in: ONNX Runtime takes no bfloat16 from NumPy.
        floats = [x.float().numpy() for x in (*batched, inputs["output_weight"])]
        body = run("ContributionScore", [*floats, positions[positions >= 0].numpy()], scale=scale)
        torch.testing.assert_close(scores[row], torch.from_numpy(body), rtol=RTOL, atol=0, equal_nan=True)
    return scores


@REALS
@pytest.mark.parametrize("head_size", [16, 32, 64, 80, 96, 128])
def test_every_head_size(head_size: int, real: torch.dtype) -> None:
    checked(case(head_size=head_size, real=real))


@REALS
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (6, 2), (7, 1), (14, 2)])
def test_groups_of_heads(heads: int, kv_heads: int, real: torch.dtype) -> None:
    checked(case(heads, kv_heads, real=real))


# Blocks are of 32 to 128 tokens and of 128 columns.
@pytest.mark.parametrize("tokens", [1, 63, 128, 129, 1000])
@pytest.mark.parametrize("hidden_size", [16, 128, 272])
def test_odd_shapes(tokens: int, hidden_size: int) -> None:
    checked(case(tokens=tokens, hidden_size=hidden_size, num_text=min(tokens, 40) - 1))


@REALS
def test_prompts_of_a_batch_do_not_mix(real: torch.dtype) -> None:
    inputs = case(heads=6, kv_heads=2, tokens=150, hidden_size=144, batch=2, num_text=5, real=real)
    scores = checked(inputs)
    assert scores.isinf().sum(dim=1).tolist() == [5, 4]


@pytest.mark.slow
def test_more_tokens_than_the_softmax_takes_at_once() -> None:
    checked(case(heads=2, head_size=16, tokens=16_384 + 70, hidden_size=16, num_text=70))


def test_all_text() -> None:
    assert (checked(case(num_text=63)) == TEXT).all()


def test_no_text() -> None:
    assert checked(case(num_text=0)).isfinite().all()


def test_equal_tokens_have_equal_scores() -> None:
    inputs = case(tokens=200, num_text=0)
    for name in ("key", "value"):
        inputs[name][:] = inputs[name][:, :, :1]
    # To the bit, or the order of tokens in memory would decide which are kept.
    assert len(checked(inputs).unique()) == 1


@REALS
def test_scores_far_beyond_half(real: torch.dtype) -> None:
    inputs = case(real=real, num_text=0)
    for name in ("value", "output_weight"):
        inputs[name] = inputs[name].sign() * 65504
    scores = checked(inputs)
    # Sums of squares of which half holds none.
    assert scores.max() > 65504**2


def test_logits_far_beyond_half() -> None:
    inputs = case(num_text=0)
    inputs["query"] = inputs["query"].sign() * 65504
    inputs["key"] = inputs["key"].sign() * 65504
    # Up to 1e11 before they are scaled.
    assert checked(inputs, scale=65504.0**-2).isfinite().all()


@REALS
def test_attention_below_the_smallest_half_still_counts(real: torch.dtype) -> None:
    # Attention falls to 1e-14, and every token writes a vector of norm 1: the score is the attention.
    inputs = case(heads=1, num_text=0, real=real)
    for name in ("query", "key", "value", "output_weight"):
        inputs[name].zero_()[..., 0] = 1
    inputs["key"][..., 0] = -torch.arange(63)
    inputs["output_weight"][1:] = 0
    scores = checked(inputs, scale=0.5)
    expected = torch.softmax(-0.5 * torch.arange(63).double(), dim=0)
    torch.testing.assert_close(scores[0].double(), expected, rtol=RTOL, atol=0)
    assert scores.half().count_nonzero() < 40 < scores.count_nonzero()


def test_tokens_are_told_apart_when_one_takes_all_attention() -> None:
    # The others get 1e-11, which half would round to zero.
    inputs = case(heads=1, num_text=0)
    inputs["query"].fill_(1)
    inputs["key"].zero_()[:, :, -1] = 25
    scores = checked(inputs, scale=1 / 32)[0, :-1]
    norms = (inputs["value"][0, 0].float() @ inputs["output_weight"].float().T).norm(dim=1)[:-1]
    assert scores.argsort().tolist() == norms.argsort().tolist()


def test_an_overflowed_score_is_the_largest_finite_one() -> None:
    inputs = case(num_text=0, real=torch.bfloat16)
    inputs["value"][:, :, 7] = 1e25
    assert (checked(inputs)[0] == LARGEST).nonzero().tolist() == [[7]]


def test_an_infinite_value_is_the_largest_score_too() -> None:
    # 144 columns: in the rest of their block, zero times infinity must not count.
    inputs = case(heads=2, kv_heads=2, hidden_size=144, num_text=0)
    inputs["value"][0, 1, 40, 5] = torch.inf
    assert (checked(inputs)[0] == LARGEST).nonzero().tolist() == [[40]]


@REALS
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("name", ["query", "key", "value", "output_weight"])
def test_what_is_not_finite(name: str, value: float, real: torch.dtype) -> None:
    inputs = case(heads=4, kv_heads=2, tokens=130, hidden_size=144, real=real)
    index = {"query": (0, 3, 0, 5), "key": (0, 1, 40, 5), "value": (0, 1, 40, 5), "output_weight": (143, 70)}[name]
    inputs[name][index] = value
    scores = checked(inputs)
    assert (scores == TEXT).sum() == 2


@pytest.mark.parametrize("tokens", [[5], range(63)], ids=["one", "all"])
def test_logits_of_minus_infinity(tokens: Any) -> None:
    inputs = case(heads=1, num_text=0)
    inputs["query"].fill_(1)
    inputs["key"][:, :, list(tokens)] = -torch.inf
    scores = checked(inputs)[0]
    # A token without attention writes nothing; attention to nothing is no number, in the body too.
    assert scores.isnan().all() if len(tokens) == 63 else scores[5] == 0


def test_an_infinite_value_of_a_token_without_attention_is_no_number() -> None:
    inputs = case(heads=1, num_text=0)
    inputs["query"].fill_(1)
    inputs["key"][:, :, 5] = -torch.inf
    inputs["value"][:, :, 5] = torch.inf
    scores = checked(inputs)[0]
    assert scores.isnan().nonzero().tolist() == [[5]]
