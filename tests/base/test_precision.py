"""The table of precisions against the libraries whose names it holds."""

from typing import get_args

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import save

from capa_export.base.precision import FORMATS, FP16_MAX, Precision


def test_every_precision_has_a_format() -> None:
    assert set(FORMATS) == set(get_args(Precision))
    assert torch.finfo(torch.float16).max == FP16_MAX


@pytest.mark.parametrize("name", FORMATS)
def test_names_and_sizes_are_those_of_the_libraries(name: str) -> None:
    form = FORMATS[name]
    onnx, dtype = ir.DataType[form.onnx], getattr(torch, form.array)
    assert onnx.numpy() == np.dtype(getattr(ml_dtypes, form.array, form.array))
    assert (onnx.itemsize, dtype.itemsize) == (form.num_bytes, form.num_bytes)
    assert torch.finfo(dtype).eps == form.epsilon
    assert f'"dtype":"{form.safetensors}"'.encode() in save({"x": torch.zeros(1, dtype=dtype)})
