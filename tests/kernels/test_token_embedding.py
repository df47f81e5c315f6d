"""The kernel of TokenEmbedding against its reference, to the bit."""

import pytest
import torch

from capa_export.kernels.execute import execute
from capa_export.kernels.token_embedding import OPERATOR, reference

REALS = pytest.mark.parametrize("real", [torch.float16, torch.bfloat16, torch.float32], ids=["fp16", "bf16", "fp32"])


def case(
    tokens: list[int], hidden_size: int = 48, axes: int = 3, stages: int = 2, real: torch.dtype = torch.float16
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(hidden_size)
    batch = len(tokens)
    return {
        "tokens": torch.tensor(tokens),
        "table": torch.randn((40, hidden_size), generator=generator).to(real),
        "positions": torch.randint(1000, (axes, batch), generator=generator),
        "lengths": torch.randint(1000, (stages, batch), generator=generator),
    }


# A block is of 1024 columns.
@REALS
@pytest.mark.parametrize(
    ("tokens", "hidden_size", "axes", "stages"), [([0], 16, 1, 1), ([39, 0, 7], 1040, 3, 2), ([5] * 4, 64, 4, 3)]
)
def test_rows_of_the_table(tokens: list[int], hidden_size: int, axes: int, stages: int, real: torch.dtype) -> None:
    inputs = case(tokens, hidden_size, axes, stages, real)
    embeds, positions, lengths = reference(**inputs)
    found = execute(OPERATOR, inputs)["embeds"]
    assert torch.equal(found, embeds)
    assert torch.equal(inputs["positions"], positions) and torch.equal(inputs["lengths"], lengths)


def test_no_token_has_no_row() -> None:
    assert not execute(OPERATOR, case([-1, 40]))["embeds"].any()
