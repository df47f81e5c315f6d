"""The kernels of LikeliestToken and SampledToken against the tokens that the host chooses from the same logits."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from capa_export.kernels.execute import execute
from capa_export.kernels.token_choice import COLDEST, LIKELIEST, NEVER, SAMPLED, SEEN
from capa_export.model.generation import Generation
from capa_export.run.decoding import NONE_LEFT, NOT_FINITE, TokenChooser


def case(
    vocabulary: int, batch: int = 1, *, levels: int = 0, seed: int = 0, **given: Any
) -> tuple[dict[str, torch.Tensor], list[int]]:
    """What the kernels take, and the tokens that the host chooses.

    Args:
        vocabulary: tokens.
        batch: answers.
        levels: different logits, so that there are ties; 0 ties none.
        seed: of everything.
        given: settings of generation.
    """
    random = np.random.default_rng(seed)
    logits = random.normal(0, 3, (batch, vocabulary)).astype(np.float32)
    if levels:
        logits = (logits.clip(-9, 9) * levels / 18).round().astype(np.float32) * 18 / levels
    settings = Generation(**given, source=Path("generation_config.json"))
    marks = np.zeros((batch, vocabulary), np.int32)
    marks[:, settings.suppress_tokens] = NEVER
    choosers = [TokenChooser(settings, random.integers(vocabulary, size=5).tolist(), [], random) for _ in range(batch)]
    said = random.integers(50, size=batch).astype(np.int32)
    for row, (chooser, count) in enumerate(zip(choosers, said, strict=True)):
        marks[row, chooser.tokens] |= SEEN
        chooser.tokens += [chooser.tokens[0]] * count
    numbers = [settings.repetition_penalty, 1.0, 1.0, 0.0]
    if settings.do_sample:
        numbers[1:] = max(settings.temperature, COLDEST), settings.top_p, settings.min_p or 0
    inputs = {
        "logits": torch.from_numpy(logits),
        "marks": torch.from_numpy(marks),
        "numbers": torch.tensor(numbers),
        "said": torch.from_numpy(said),
    }
    if settings.do_sample:
        keys = np.array([chooser.key for chooser in choosers], np.uint64).view(np.int64)
        inputs |= {"top_k": torch.tensor([settings.top_k], dtype=torch.int32), "keys": torch.from_numpy(keys)}
    return inputs, [chooser(row.copy()) for chooser, row in zip(choosers, logits, strict=True)]


def checked(inputs: dict[str, torch.Tensor], expected: list[int]) -> None:
    """Hold the kernels' tokens against those expected, and what is kept for the next step."""
    marks, said = inputs["marks"].clone(), inputs["said"].clone()
    found = execute(SAMPLED if "keys" in inputs else LIKELIEST, inputs)["tokens"]
    assert found.tolist() == expected
    marks[range(len(expected)), expected] |= SEEN
    assert torch.equal(inputs["marks"], marks)
    assert torch.equal(inputs["said"], said + 1)


# A block is of 1024 tokens, and 256 blocks are looked at side by side.
@pytest.mark.parametrize(("vocabulary", "batch"), [(1, 1), (40, 3), (1024, 1), (1025, 2)])
@pytest.mark.parametrize("given", [{}, {"repetition_penalty": 1.3}, {"repetition_penalty": 0.8}], ids=str)
def test_the_likeliest_is_the_host_s(vocabulary: int, batch: int, given: dict[str, Any]) -> None:
    checked(*case(vocabulary, batch, seed=vocabulary, **given))


def test_of_ties_the_first_is_the_likeliest() -> None:
    inputs, expected = case(3000, 2, levels=4, suppress_tokens=[0, 1, 2])
    assert int((inputs["logits"] == inputs["logits"].max()).sum()) > 2
    checked(inputs, expected)
    everywhere = case(2500)[0] | {"logits": torch.full((1, 2500), -7.0)}
    checked(everywhere, [0])


def test_more_blocks_than_are_looked_at_at_once() -> None:
    checked(*case(270_000))


SETTINGS = [
    {"top_k": 0},
    {"top_k": 0, "temperature": 0.3, "repetition_penalty": 1.2, "suppress_tokens": [3, 4]},
    {},
    {"top_k": 1},
    {"top_k": 3, "temperature": 5.0},
    {"top_k": 10**6, "top_p": 0.5},
    {"top_p": 0.9},
    {"top_p": 0.0},
    {"top_p": 0.001, "temperature": 0.1, "repetition_penalty": 1.05},
    {"top_k": 20, "top_p": 0.8, "temperature": 0.7},
    {"top_k": 0, "min_p": 0.05},
    {"top_k": 0, "min_p": 1.0},
    {"top_p": 0.95, "min_p": 0.1, "temperature": 2.0},
    {"temperature": 1e-6},
    {"temperature": 1e-45},
]


@pytest.mark.parametrize(
    "given",
    [
        # The defaults, and every setting among others.
        pytest.param(given, marks=pytest.mark.exhaustive if len(given) in (1, 2) else ())
        for given in SETTINGS
    ],
    ids=str,
)
def test_samples_are_the_host_s(given: dict[str, Any]) -> None:
    """Without ties, and with so many that they decide which tokens are likely enough."""
    checked(*case(1025, do_sample=True, **given))
    checked(*case(90, 3, levels=7, seed=1, do_sample=True, **given))


def test_as_many_as_there_are_blocks_are_found_among_few() -> None:
    """Of 10 blocks, so that the highest of each tell which tokens top-k looks at."""
    for top_k in (1, 9, 10, 11):
        checked(*case(10_000, top_k=top_k, seed=top_k, do_sample=True, temperature=9.0))


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("value", [np.nan, np.inf], ids=str)
def test_what_is_no_number_chooses_no_token(value: float, do_sample: bool) -> None:  # noqa: FBT001
    inputs, _ = case(2000, 2, do_sample=do_sample)
    inputs["logits"][1, 1500] = value
    marks = inputs["marks"][1].clone()
    tokens = execute(SAMPLED if do_sample else LIKELIEST, inputs)["tokens"].tolist()
    assert tokens[0] >= 0 and tokens[1] == NOT_FINITE
    assert torch.equal(inputs["marks"][1], marks)


def test_a_vocabulary_that_may_not_be_said_chooses_no_token() -> None:
    for do_sample in (False, True):
        inputs, _ = case(40, do_sample=do_sample)
        inputs["marks"][:] = NEVER
        assert execute(SAMPLED if do_sample else LIKELIEST, inputs)["tokens"].tolist() == [NONE_LEFT]
