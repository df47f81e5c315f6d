"""What is timed on a GPU computes what the graphs compute, and how its time is taken."""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from capa_export.kernels.execute import execute
from tests.benchmarks.gpu.conftest import OPERATORS
from tests.graph.one_node import run

SMALL = {"small": {"hidden_size": 48, "heads": 4, "kv_heads": 2, "tokens": 150, "kept": 70, "head_size": 32}}


def problem(module: Callable[[str], Any], operator: str, half: str = "fp16") -> Any:
    problems = module("problem").problems("cpu", SMALL)
    return next(one for one in problems if one.operator.name == operator and half in (one.half, operator))


def test_the_problems_are_those_of_true_models(module: Callable[[str], Any]) -> None:
    problems = list(module("problem").problems())
    assert len({one.name for one in problems}) == len(problems) == 3 * (2 * 3 + 1)
    for one in problems:
        assert (one.size.num_text, one.size.head_size, one.size.projection) == (48, 128, one.size.heads * 128)
        # A quarter of the visual tokens, and all of text.
        assert one.size.kept == (one.size.tokens - 48) // 4 + 48


# Not bf16, which Triton's interpreter gets wrong.
@pytest.mark.parametrize("operator", OPERATORS)
def test_kernels_meet_the_check(module: Callable[[str], Any], operator: str) -> None:
    one = problem(module, operator)
    outputs = execute(one.operator, one.inputs, **one.attributes)
    one.check(tuple(outputs.values()))
    damaged = [output.clone() for output in outputs.values()]
    damaged[-1] = damaged[-1].flip(1)
    with pytest.raises(AssertionError, match=list(outputs)[-1]):
        one.check(tuple(damaged))


@pytest.mark.parametrize("half", ["fp16", "bf16"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_bodies_meet_the_check(module: Callable[[str], Any], operator: str, half: str) -> None:
    one = problem(module, operator, half if operator != "TopKKeep" else "fp16")
    one.check(module("kernels").body_of(one, compiled=False)())


@pytest.mark.parametrize("operator", OPERATORS)
def test_bodies_are_those_of_the_onnx_functions(module: Callable[[str], Any], operator: str) -> None:
    one = problem(module, operator)
    own = module("kernels").body_of(one, compiled=False)()
    feed = [one.graph_inputs[name] for name in one.operator.inputs]
    arrays = [np.array([x]) if isinstance(x, int) else x.numpy() for x in feed]
    found = run(operator, arrays, **one.attributes)
    rtol = 4e-6 if operator == "ContributionScore" else 0
    for mine, body in zip(
        own if isinstance(own, tuple) else (own,), found if isinstance(own, tuple) else (found,), strict=True
    ):
        np.testing.assert_allclose(mine.numpy(), body, rtol=rtol, atol=0)


def test_bodies_compile_as_one_graph(module: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    for operator in OPERATORS:
        one = problem(module, operator)
        one.check(module("kernels").body_of(one, compiled=True)())


def test_a_time_is_taken_with_and_without_a_graph(module: Callable[[str], Any]) -> None:
    launched: list[str] = []

    def timer(work: Callable[[], None], *, busy: bool) -> float:
        work()
        return float(busy)

    def graph(work: Callable[[], None]) -> Callable[[], None]:
        return lambda: launched.append("graph")

    times = module("timing").timed(lambda: launched.append("kernels"), timer, graph)
    assert times == {"ms": 0, "graph_ms": 1}
    assert launched == ["kernels", "graph"]


def test_the_floor_is_what_bounds_first(module: Callable[[str], Any]) -> None:
    chip = module("timing").Chip(bytes_per_second=1e9, flops_per_second=1e12)
    cost = importlib.import_module("capa_export.kernels.operator").Cost
    assert chip.floor_ms(cost(bytes=2_000_000, flops=0)) == pytest.approx(2)
    assert chip.floor_ms(cost(bytes=0, flops=3_000_000_000)) == pytest.approx(3)
