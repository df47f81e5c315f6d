"""The kernel of TokenGather against its reference, NumPy and the ONNX body, bit by bit."""

import numpy as np
import pytest
import torch

from capa_export.kernels.execute import execute
from capa_export.kernels.token_gather import OPERATOR, reference
from tests.graph.one_node import run

AXES = {"hidden": 0, "key": 1, "value": 1, "cos": 0, "sin": 0}
"""Where a prompt's tokens are."""


def bits(
    batch: int, tokens: int, hidden_size: int, kv_heads: int, head_size: int, rotary_size: int
) -> dict[str, torch.Tensor]:
    """Random bits for all inputs but `kept`: every kind of NaN is among them."""
    generator = torch.Generator().manual_seed(tokens)
    heads, table = (batch, kv_heads, tokens, head_size), (batch, tokens, rotary_size)
    shapes = {"hidden": (batch, tokens, hidden_size), "key": heads, "value": heads, "cos": table, "sin": table}
    return {
        name: torch.randint(-(2**15), 2**15, shape, generator=generator, dtype=torch.int16)
        for name, shape in shapes.items()
    }


def check(inputs: dict[str, torch.Tensor], kept: torch.Tensor, real: torch.dtype = torch.float16) -> None:
    bits = torch.int32 if real == torch.float32 else torch.int16
    # Of FP32, the lower bits repeat the upper.
    inputs = {name: (x.to(bits) * 0x10001 if bits == torch.int32 else x) for name, x in inputs.items()}
    reals = {name: x.view(real) for name, x in inputs.items()} | {"kept": kept}
    outputs = {name: y.view(bits) for name, y in execute(OPERATOR, reals).items()}
    for (name, y), expected in zip(outputs.items(), reference(**reals), strict=True):
        assert torch.equal(y, expected.view(bits)), name
    for row, kept_K in enumerate(kept.numpy()):
        for name, axis in AXES.items():
            np.testing.assert_array_equal(
                outputs[f"{name}_kept"][row].numpy(), np.take(inputs[name][row].numpy(), kept_K, axis=axis)
            )
        batched = [inputs[name][row : row + 1].numpy() for name in AXES if name != "hidden"]
        body = run("TokenGather", [inputs["hidden"][row].numpy(), *batched, kept_K])
        np.testing.assert_array_equal(outputs["hidden_kept"][row].numpy(), body[0])
        for name, expected in zip(("key_kept", "value_kept", "cos_kept", "sin_kept"), body[1:], strict=True):
            np.testing.assert_array_equal(outputs[name][row].numpy(), expected[0])


@pytest.mark.parametrize("real", [torch.float16, torch.bfloat16, torch.float32], ids=["fp16", "bf16", "fp32"])
@pytest.mark.parametrize(("tokens", "num_keep"), [(1, 0), (1, 1), (63, 17), (63, 63), (1000, 0), (1000, 333)])
def test_every_number_of_tokens(tokens: int, num_keep: int, real: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(num_keep)
    kept = torch.randperm(tokens, generator=generator)[None, :num_keep].sort().values
    check(bits(1, tokens, 48, 2, 16, 8), kept, real)


@pytest.mark.parametrize(
    ("hidden_size", "kv_heads", "head_size", "rotary_size"),
    [(16, 1, 16, 8), (272, 3, 64, 32), (128, 2, 80, 40), (144, 4, 96, 48), (1040, 1, 128, 64), (32, 2, 256, 136)],
)
def test_every_size(hidden_size: int, kv_heads: int, head_size: int, rotary_size: int) -> None:
    check(bits(1, 33, hidden_size, kv_heads, head_size, rotary_size), torch.tensor([[0, 1, 7, 15, 16, 31, 32]]))


def test_every_prompt_of_a_batch_keeps_its_own() -> None:
    kept = torch.stack([torch.arange(0, 40, 2), torch.arange(20, 40), torch.arange(20)])
    check(bits(3, 40, 64, 2, 32, 16), kept)


def test_offsets_beyond_32_bits() -> None:
    tokens = 2**24 + 1

    def zeros(*shape: int) -> torch.Tensor:
        # NumPy asks for zeroed pages, and nobody touches most of them: four gigabytes of addresses, not of memory.
        return torch.from_numpy(np.zeros(shape, np.float16))

    key = zeros(1, 1, tokens, 128)
    key[0, 0, -1] = torch.arange(128)
    table = zeros(1, tokens, 16)
    inputs = {"hidden": table, "key": key, "value": key, "cos": table, "sin": table}
    outputs = execute(OPERATOR, {**inputs, "kept": torch.tensor([[0, tokens - 1]])})
    assert torch.equal(outputs["key_kept"][0, 0], torch.stack([torch.zeros(128), torch.arange(128)]).half())


def test_positions_that_no_prompt_has_are_left_alone() -> None:
    inputs = {name: x.view(torch.float16) for name, x in bits(1, 63, 32, 2, 32, 16).items()}
    kept = torch.tensor([[0, 62, 63, 10**12, -1]])
    hidden = execute(OPERATOR, {**inputs, "kept": kept})["hidden_kept"].view(torch.int16)[0]
    rows = inputs["hidden"].view(torch.int16)[0]
    assert torch.equal(hidden[:2], rows[[0, 62]])
    assert (hidden[2:] == hidden[2, 0]).all(), "what was there before"
