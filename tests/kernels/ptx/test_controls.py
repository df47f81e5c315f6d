"""The machine sees what is planted: a barrier less, a pointer that is off, a buffer that is too small."""

from dataclasses import replace
from types import ModuleType

import pytest
import torch

from capa_export.kernels import contribution_score, token_gather, topk_keep, visual_scale
from tests.kernels.ptx.memory import KernelError
from tests.kernels.ptx.parse import Kernel
from tests.kernels.ptx.run import outputs_of, parsed
from tests.kernels.test_contribution_score import case as score_case
from tests.kernels.test_token_gather import bits as gather_bits
from tests.kernels.test_topk_keep import prompts
from tests.kernels.test_visual_scale import case as scale_case

MODULES = {
    "attention_logits": contribution_score,
    "softmax": contribution_score,
    "written_squares": contribution_score,
    "finish": contribution_score,
    "order_tokens": topk_keep,
    "keep_best": topk_keep,
    "gather_rows": token_gather,
    "merge_rows": visual_scale,
}
VARIANTS = [
    *("attention_logits.fp16.32", "attention_logits.fp32.32", "softmax", "finish", "order_tokens", "keep_best"),
    *("written_squares.fp16.32", "written_squares.fp32.32"),
    *("gather_rows.fp16", "gather_rows.fp32", "merge_rows.fp16", "merge_rows.fp32"),
]
NOT_NEEDED = {
    # They part copies into stages of the pipeline that have shared memory of their own: barriers by their order.
    "written_squares.fp16.32": {0},
    "written_squares.fp32.32": {0, 3, 4},
}


def sample(variant: str) -> tuple[ModuleType, dict[str, torch.Tensor], dict[str, float]]:
    """An operator, and a call in which every loop of its kernel runs at least twice."""
    name, *of = variant.split(".")
    module = MODULES[name]
    real = torch.float32 if "fp32" in of else torch.float16
    if module is contribution_score:
        return module, score_case(4, 2, 32, tokens=70, hidden_size=144, num_text=36, real=real), {"scale": 0.125}
    if module is topk_keep:
        inputs = {"scores": prompts(300, text=0.03), "num_keep": torch.tensor([77])}
        return module, inputs, {"min_keep_per_image": 1}
    if module is visual_scale:
        return module, scale_case(70, 48, num_text=66, real=real), {}
    bits = gather_bits(1, 45, 144, 1, 144, 136)
    reals = {name: (x.to(torch.int32) * 0x10001 if real == torch.float32 else x).view(real) for name, x in bits.items()}
    return module, reals | {"kept": torch.arange(0, 34, 2)[None]}, {}


def run(variant: str, kernel: Kernel | None = None, **faults: dict[str, int]) -> None:
    """Run one kernel on the sample; `test_operators` says that what comes out is right."""
    module, inputs, attributes = sample(variant)
    outputs_of(module.OPERATOR, inputs, only=kernel or parsed(variant, "8.0"), **faults, **attributes)


def error_of(variant: str, kernel: Kernel) -> str:
    """What is wrong with the kernel on the sample, empty if nothing is."""
    try:
        run(variant, kernel)
    except KernelError as error:
        return str(error)
    return ""


OTHERS = {"attention_logits.fp32.32", "written_squares.fp16.32", "gather_rows.fp32", "merge_rows.fp16"}
"""Kernels that lose their barriers in the other precision, too, wait for `make test-all`."""


@pytest.mark.parametrize(
    "variant",
    [pytest.param(variant, marks=pytest.mark.exhaustive if variant in OTHERS else ()) for variant in VARIANTS],
)
def test_the_loss_of_a_barrier_is_seen_but_of_those_that_are_not_needed(variant: str) -> None:
    kernel = parsed(variant, "8.0")
    assert error_of(variant, kernel) == ""
    errors = [error_of(variant, kernel.without(index)) for index in kernel.indices("bar")]
    assert {order for order, error in enumerate(errors) if not error} == NOT_NEEDED.get(variant, set())
    assert all(error.startswith(("race: shared memory", "shared memory is read before")) for error in errors if error)


@pytest.mark.parametrize("variant", ["written_squares.fp16.32", "written_squares.fp32.32"])
def test_the_loss_of_a_wait_for_copies_is_seen_but_of_the_last(variant: str) -> None:
    kernel = parsed(variant, "8.0")
    errors: list[str] = []
    for index in kernel.indices("cp", "wait_group"):
        wait = kernel.instructions[index]
        assert isinstance(wait.operands[0], str)
        longer = replace(wait, operands=(str(int(wait.operands[0]) + 2),))
        errors.append(error_of(variant, kernel.with_instruction(index, longer)))
    # What is copied behind the last step is never read.
    assert [*map(bool, errors)] == [True] * (len(errors) - 1) + [False]
    assert all("nobody waited for" in error for error in errors[:-1])
    assert len(errors) >= 2


@pytest.mark.parametrize(
    ("variant", "name"),
    [
        ("attention_logits.fp16.32", "key"),
        ("written_squares.fp16.32", "value"),
        ("written_squares.fp32.32", "output_weight"),
        ("gather_rows.fp16", "hidden"),
        ("merge_rows.fp32", "x"),
    ],
)
def test_a_pointer_that_is_no_multiple_of_16_is_seen(variant: str, name: str) -> None:
    run(variant, shifts={name: 16})
    with pytest.raises(KernelError, match=f"misaligned: 16 bytes of {name}"):
        run(variant, shifts={name: 8})


@pytest.mark.parametrize(
    ("variant", "name"),
    [("finish", "scores"), ("keep_best", "kept"), ("gather_rows.fp16", "hidden_kept"), ("merge_rows.fp32", "y")],
)
def test_a_store_past_the_end_is_seen(variant: str, name: str) -> None:
    with pytest.raises(KernelError, match=rf"out of bounds: {name} has \d+ bytes, not \d+"):
        run(variant, missing={name: 2})
