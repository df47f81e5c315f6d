"""INT4 weights as ONNX holds them: [in, out], two numbers an octet, in blocks of inputs with one scale an output.

That is the layout that ONNX Runtime and TensorRT both multiply with as it is stored.
"""

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from capa_export.config.quantization import GROUPS
from capa_export.model.quantized.weight import Array, QuantizedWeight

__all__ = ["BlockForm", "block_form", "input_scales", "packed_scales", "packed_values", "packed_zeros"]

_NAMES = {"int8": "8 bits", "fp8": "FP8", "fp4": "FP4"}


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockForm:
    """What stands beside the numbers of an INT4 weight."""

    group: int
    """Inputs that share a scale."""
    has_zeros: bool = False
    """Whether a group has a zero point other than zero."""
    input_scale: bytes | None = None
    """Factors of the inputs, by which equal ones are known; None where there are none."""


def block_form(weight: QuantizedWeight) -> BlockForm | str:
    """How standard INT4 blocks hold a weight, or why they cannot. Its values are not read."""
    if weight.kind != "int4":
        return _NAMES[weight.kind]
    if weight.input_order is not None:
        return "inputs in another order"
    if weight.group_size not in GROUPS:
        return f"groups of {weight.group_size}, not of {', '.join(map(str, GROUPS))}"
    if len(weight.scales) % 2:
        return "an odd number of outputs"
    return BlockForm(
        group=weight.group_size,
        has_zeros=weight.zero_points is not None and bool((weight.zero_points != weight.raised).any()),
        input_scale=None if weight.pre_scale is None else weight.pre_scale.tobytes(),
    )


def packed_values(weight: QuantizedWeight) -> Array:
    """The whole numbers [in, out]."""
    values = np.ascontiguousarray(weight.read_values().T)
    return (values.astype(np.int8) - np.int8(weight.raised)).astype(ml_dtypes.int4)


def packed_scales(weight: QuantizedWeight) -> Array:
    """The scales [groups, out] in FP32."""
    return np.ascontiguousarray(weight.scales.T).astype(np.float32) * np.float32(weight.outer_scale)


def packed_zeros(weight: QuantizedWeight) -> Array:
    """What a number of zero stands for, [groups, out] in FP32."""
    assert weight.zero_points is not None
    return packed_scales(weight) * (np.float32(weight.raised) - weight.zero_points.T.astype(np.float32))


def input_scales(weight: QuantizedWeight) -> Array:
    """Factors of the inputs [in] in FP32."""
    assert weight.pre_scale is not None
    return weight.pre_scale.astype(np.float32)
