"""Weights of few bits as ONNX holds them: [in, out], with a scale for every output, or for every block of its inputs.

That is the layout that ONNX Runtime and TensorRT both multiply with as it is stored.
"""

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from capa_export.base.weight_types import WEIGHT_TYPES, NumberKind
from capa_export.model.quantized.weight import Array, QuantizedWeight

__all__ = [
    "BlockForm",
    "block_form",
    "input_scales",
    "outer_scale",
    "packed_scales",
    "packed_values",
    "packed_zeros",
]

_ROOM_BITS, _SMALLEST_BITS = 6, -14


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockForm:
    """What graphs hold of a weight, and what stands beside its numbers."""

    kind: NumberKind
    group: int | None
    """Inputs that share a scale; None where all inputs of an output do."""
    has_zeros: bool = False
    """Whether a group has a zero point other than zero."""
    input_scale: bytes | None = None
    """Factors of the inputs, by which equal ones are known; None where there are none."""


def block_form(weight: QuantizedWeight) -> BlockForm | str:
    """How standard ONNX holds a weight as it is, or why it cannot. Its values are not read."""
    kind = WEIGHT_TYPES[weight.kind]
    num_outputs, num_groups = weight.scales.shape
    group = weight.group_size if kind.groups else None
    if weight.input_order is not None:
        return "inputs in another order"
    if group is not None and group not in kind.groups:
        return f"groups of {group}, not of {', '.join(map(str, kind.groups))}"
    if group is None and num_groups > 1:
        return f"{kind.name} in groups of {weight.group_size}"
    if kind.bits == 4 and num_outputs % 2:
        return "an odd number of outputs"
    return BlockForm(
        kind=weight.kind,
        group=group,
        has_zeros=weight.zero_points is not None and bool((weight.zero_points != weight.raised).any()),
        input_scale=None if weight.pre_scale is None else weight.pre_scale.tobytes(),
    )


def packed_values(weight: QuantizedWeight) -> Array:
    """The numbers [in, out]; those of NVFP4 two an octet, [in, out/2], the first in the low bits."""
    values = np.ascontiguousarray(weight.read_values().T)
    if weight.kind == "nvfp4":
        codes = values.view(np.uint8) & 15
        return codes[:, 0::2] | codes[:, 1::2] << 4
    if weight.kind == "fp8":
        return values
    numbers = values.astype(np.int16) - np.int16(weight.raised)
    return numbers.astype(ml_dtypes.int4 if weight.kind == "int4" else np.int8)


def packed_scales(weight: QuantizedWeight) -> Array:
    """The scales under the outer one: [groups, out] in FP32, of NVFP4 in FP8; [out] where all inputs share one."""
    scales = np.ascontiguousarray(weight.scales.T)
    if weight.kind == "nvfp4":
        return scales
    if WEIGHT_TYPES[weight.kind].groups:
        return scales.astype(np.float32) * np.float32(weight.outer_scale)
    return _of_outputs(weight) / outer_scale(weight)


def outer_scale(weight: QuantizedWeight) -> Array:
    """The FP32 scale of scales, where they are FP8 or stand behind the product.

    Behind a product, it is a power of two far enough below the largest scale that a sum under it is no larger than the
    largest that the product has, and far enough above FP16's smallest numbers.
    """
    if weight.kind == "nvfp4":
        return np.float32(weight.outer_scale).reshape(())
    with np.errstate(divide="ignore", invalid="ignore"):
        exponent = np.floor(np.log2(_of_outputs(weight).max())) - _ROOM_BITS
        return np.exp2(np.maximum(exponent, np.float32(_SMALLEST_BITS))).astype(np.float32).reshape(())


def _of_outputs(weight: QuantizedWeight) -> Array:
    """The one scale of every output, in FP32."""
    return weight.scales[:, 0].astype(np.float32) * np.float32(weight.outer_scale)


def packed_zeros(weight: QuantizedWeight) -> Array:
    """What a number of zero stands for, [groups, out] in FP32."""
    assert weight.zero_points is not None
    scales = np.ascontiguousarray(weight.scales.T).astype(np.float32) * np.float32(weight.outer_scale)
    return scales * (np.float32(weight.raised) - weight.zero_points.T.astype(np.float32))


def input_scales(weight: QuantizedWeight) -> Array:
    """Factors of the inputs [in] in FP32."""
    assert weight.pre_scale is not None
    return weight.pre_scale.astype(np.float32)
