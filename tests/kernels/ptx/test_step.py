"""The kernels that are launched beside engines, run from the PTX that a GPU would get."""

from typing import Any

import pytest
import torch

from capa_export.kernels import token_embedding
from capa_export.kernels.token_choice import LIKELIEST, NEVER, SAMPLED, SEEN
from capa_export.run.decoding import NONE_LEFT, NOT_FINITE
from tests.kernels.ptx.run import outputs_of
from tests.kernels.test_token_choice import case as choice_case
from tests.kernels.test_token_embedding import REALS
from tests.kernels.test_token_embedding import case as embedding_case


@REALS
@pytest.mark.parametrize(("tokens", "hidden_size", "axes"), [([39], 16, 1), ([0, 7, 38], 1040, 3)])
def test_rows_of_the_table(tokens: list[int], hidden_size: int, axes: int, real: torch.dtype) -> None:
    inputs = embedding_case(tokens, hidden_size, axes, real=real)
    found = outputs_of(token_embedding.OPERATOR, inputs, changed=("positions", "lengths"))
    for one, other in zip(found.values(), token_embedding.reference(**inputs), strict=True):
        assert torch.equal(one, other)


def checked(inputs: dict[str, torch.Tensor], expected: list[int]) -> None:
    """Hold the tokens against those expected, and what is kept for the next step."""
    found = outputs_of(SAMPLED if "keys" in inputs else LIKELIEST, inputs, changed=("marks", "said"))
    assert found["tokens"].tolist() == expected
    marks = inputs["marks"].clone()
    for row, token in enumerate(expected):
        if token >= 0:
            marks[row, token] |= SEEN
    assert torch.equal(found["marks"], marks)
    assert torch.equal(found["said"], inputs["said"] + 1)


@pytest.mark.parametrize(("vocabulary", "levels"), [(1, 0), (1030, 0), (3000, 4)])
def test_the_likeliest_is_the_host_s(vocabulary: int, levels: int) -> None:
    checked(
        *choice_case(vocabulary, 2, levels=levels, repetition_penalty=1.2, suppress_tokens=[40] * (vocabulary > 40))
    )


@pytest.mark.parametrize(
    ("vocabulary", "levels", "given"),
    [
        (1, 0, {}),
        (1030, 0, {"top_k": 0, "temperature": 3.0}),
        (3100, 0, {"top_k": 3, "temperature": 2.0}),
        (90, 7, {"top_k": 20, "top_p": 0.8, "temperature": 0.7, "repetition_penalty": 1.05}),
        (1030, 0, {"top_p": 0.001, "temperature": 0.1}),
        (90, 7, {"top_k": 0, "top_p": 0.9, "min_p": 0.1}),
    ],
)
def test_samples_are_the_host_s(vocabulary: int, levels: int, given: dict[str, Any]) -> None:
    checked(*choice_case(vocabulary, 2, levels=levels, do_sample=True, **given))


@pytest.mark.parametrize("do_sample", [False, True])
def test_what_is_no_number_chooses_no_token(do_sample: bool) -> None:  # noqa: FBT001
    inputs, expected = choice_case(50, 3, do_sample=do_sample)
    inputs["logits"][0, 7] = torch.nan
    inputs["marks"][2] = NEVER
    checked(inputs, [NOT_FINITE, expected[1], NONE_LEFT])
