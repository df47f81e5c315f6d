"""Teaches Triton's interpreter bfloat16, whose bits it keeps in integers: it cuts FP32 off and multiplies bits."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def values(bits: np.ndarray) -> np.ndarray:
    return torch.tensor(bits).view(torch.bfloat16).float().numpy()


@pytest.fixture(autouse=True)
def bfloat16(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """FP32 is rounded to nearest even and products are exact in FP32, as on a GPU."""
    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def cast_bfloat16(self: Any, x: Any, dtype: Any) -> Any:
        match x.dtype.scalar, dtype.scalar:
            case tl.float32, tl.bfloat16:
                return TensorHandle(torch.tensor(x.data).bfloat16().view(torch.uint16).numpy(), tl.bfloat16)
            case tl.bfloat16, tl.float32:
                return TensorHandle(values(x.data), tl.float32)
        return cast(self, x, dtype)

    def dot_bfloat16(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (TensorHandle(values(x.data), tl.float32) for x in (a, b))
        return dot(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast_bfloat16)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot_bfloat16)
    # Infinities and NaN are among what is tested.
    with np.errstate(all="ignore"):
        yield
