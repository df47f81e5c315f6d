"""A small model computes with one thread, a larger one with all; both leave the number as it was."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from capa_export.model.eager import Eager
from capa_export.model.eager_plan import EagerInputs, EagerPlan
from capa_export.model.families import qwen25vl
from capa_export.model.prompt import Prompter
from capa_export.model.threads import worthwhile_threads
from tests.conftest import noise
from tests.models.qwen25vl import random_model


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_a_small_model_runs_with_one(model: Any, prompter: Prompter) -> None:
    prompt = prompter("what color is the star ?", [noise(112, 84)])
    inputs, seen = EagerInputs.of(qwen25vl.eager_inputs(model, prompt)), set[int]()
    Eager(model).prefill(
        inputs,
        torch.from_numpy(prompt.is_visual),
        EagerPlan(),
        watch=lambda *_: seen.add(torch.get_num_threads()),
    )
    assert seen == {1}
    assert torch.get_num_threads() == 3


def test_an_error_gives_them_back(model: Any) -> None:
    with pytest.raises(ValueError, match="stopped"), worthwhile_threads(model):
        raise ValueError("stopped")
    assert torch.get_num_threads() == 3


def test_a_larger_model_runs_with_all() -> None:
    model = random_model(num_hidden_layers=1, intermediate_size=8192)
    with worthwhile_threads(model):
        assert torch.get_num_threads() == 3
