"""The kernel of VisualScale against its reference and against the ONNX body, to the bit."""

import pytest
import torch

from capa_export.kernels.execute import execute
from capa_export.kernels.visual_scale import OPERATOR, reference
from tests.graph.test_functions import run

REALS = pytest.mark.parametrize("real", [torch.float16, torch.bfloat16, torch.float32], ids=["fp16", "bf16", "fp32"])


def case(
    tokens: int = 63,
    hidden_size: int = 48,
    batch: int = 1,
    num_text: int = 5,
    real: torch.dtype = torch.float16,
) -> dict[str, torch.Tensor]:
    """Random inputs, text spread over the prompt; the last prompt of a batch has one text token less."""
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(real)

    order = torch.stack([torch.randperm(tokens, generator=generator) for _ in range(batch)])
    rows = order[:, :num_text].sort().values
    if batch > 1 and num_text:
        rows[-1, -1] = -1
    return {
        "x": normal(batch, tokens, hidden_size),
        "scale": normal(hidden_size),
        "text": normal(batch, num_text, hidden_size),
        "text_rows": rows,
    }


def checked(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The output, equal to the reference's, and to that of the ONNX body prompt by prompt."""
    y = execute(OPERATOR, inputs)["y"]
    torch.testing.assert_close(y, reference(**inputs), rtol=0, atol=0, equal_nan=True)
    for row, rows in enumerate(inputs["text_rows"]):
        one = [inputs["x"][row], inputs["scale"], inputs["text"][row, rows >= 0], rows[rows >= 0]]
        if y.dtype == torch.bfloat16:
            # ONNX Runtime has no product of bfloat16; its product in FP32, rounded once, is the same.
            one = [x.float() if x.is_floating_point() else x for x in one]
        body = torch.from_numpy(run("VisualScale", [x.numpy() for x in one])).to(y.dtype)
        torch.testing.assert_close(y[row], body, rtol=0, atol=0, equal_nan=True)
    return y


# A block is of 4 tokens, and text is searched 64 rows at a time.
@REALS
@pytest.mark.parametrize(("tokens", "num_text"), [(1, 0), (1, 1), (63, 5), (150, 129), (1000, 3)])
def test_odd_shapes(tokens: int, num_text: int, real: torch.dtype) -> None:
    checked(case(tokens, num_text=num_text, real=real))


# A block is of 1024 columns.
@REALS
@pytest.mark.parametrize("hidden_size", [16, 1024, 1040])
def test_widths(hidden_size: int, real: torch.dtype) -> None:
    checked(case(hidden_size=hidden_size, real=real))


@REALS
def test_prompts_of_a_batch_do_not_mix(real: torch.dtype) -> None:
    checked(case(batch=3, real=real))


@pytest.mark.parametrize("num_text", [0, 63])
def test_no_text_and_all_text(num_text: int) -> None:
    checked(case(num_text=num_text))


@REALS
def test_products_beyond_half_are_infinite_and_text_stays(real: torch.dtype) -> None:
    inputs = case(real=real)
    for name in ("x", "scale", "text"):
        inputs[name] = inputs[name].sign() * 65504
    y = checked(inputs)
    rows = inputs["text_rows"][0]
    assert torch.equal(y[0, rows], inputs["text"][0])
    assert y.isinf().sum() == ((63 - len(rows)) * 48 if real == torch.float16 else 0)


@REALS
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_what_is_not_finite_stays_in_its_place(value: float, real: torch.dtype) -> None:
    inputs = case(real=real)
    is_text = torch.zeros(63, dtype=torch.bool)
    is_text[inputs["text_rows"][0]] = True
    visual = int((~is_text).nonzero()[0])
    inputs["x"][0, is_text] = value
    assert checked(inputs).isfinite().all()
    inputs["x"][0, visual, 3] = value
    inputs["scale"][5] = value
    inputs["text"][0, 1, 7] = value
    y = checked(inputs)
    assert (~y.isfinite()).sum() == 1 + (63 - 5) + 1


def test_a_scale_of_zero_leaves_text_alone() -> None:
    inputs = case()
    inputs["scale"].zero_()
    assert checked(inputs).any(dim=2).sum() == 5
