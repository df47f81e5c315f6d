"""Weights of few bits, held element by element to the formula that their type states."""

import numpy as np
import pytest

from capa_export.model.quantized.weight import QuantizedWeight

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("outputs", "inputs", "group"), [(3, 40, 16), (130, 64, 32), (5, 24, 24), (2, 8, 64), (66, 520, 128)]
)
@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("permuted", [False, True])
def test_every_element_is_what_the_formula_says(
    outputs: int, inputs: int, group: int, *, by_columns: bool, permuted: bool
) -> None:
    groups = -(-inputs // group)
    values = RNG.integers(0, 16, (inputs, outputs) if by_columns else (outputs, inputs), dtype=np.uint8)
    values = values.T if by_columns else values
    zero_points = RNG.integers(0, 16, (outputs, groups), dtype=np.uint8)
    scales = RNG.random((outputs, groups), np.float32).astype(np.float16)
    factors = RNG.random(inputs, np.float32)
    order = RNG.permutation(inputs) if permuted else np.arange(inputs)
    weight = QuantizedWeight(
        kind="int4",
        read_values=lambda: values,
        scales=scales,
        group_size=group,
        zero_points=zero_points,
        outer_scale=0.5,
        pre_scale=factors,
        input_order=order if permuted else None,
    )
    expected = np.empty((outputs, inputs), np.float32)
    for output, column in np.ndindex(outputs, inputs):
        scale = np.float32(scales[output, column // group]) * np.float32(0.5)
        difference = np.float32(values[output, column]) - np.float32(zero_points[output, column // group])
        expected[output, order[column]] = difference * scale * factors[order[column]]
    np.testing.assert_array_equal(weight.dequantized(), expected)
    out = np.full_like(expected, np.nan)
    assert weight.dequantized(out) is out
    np.testing.assert_array_equal(out, expected)
