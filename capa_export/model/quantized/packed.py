"""INT4 weights as ONNX holds them: [in, out], two numbers an octet, in blocks of inputs with one scale an output.

That is the layout that ONNX Runtime and TensorRT both multiply with as it is stored.
"""

import ml_dtypes
import numpy as np

from capa_export.config.quantization import GROUPS
from capa_export.model.quantized.weight import Array, QuantizedWeight

__all__ = ["packed_scales", "packed_values", "why_expanded"]

_NAMES = {"int8": "8 bits", "fp8": "FP8", "fp4": "FP4"}


def why_expanded(weight: QuantizedWeight) -> str | None:
    """Why standard INT4 blocks cannot hold a weight; None where they can. Its values are not read."""
    if weight.kind != "int4":
        return _NAMES[weight.kind]
    if weight.input_order is not None:
        return "inputs in another order"
    if weight.group_size not in GROUPS:
        return f"groups of {weight.group_size}, not of {', '.join(map(str, GROUPS))}"
    if len(weight.scales) % 2:
        return "an odd number of outputs"
    if weight.zero_points is not None and (weight.zero_points != weight.raised).any():
        return "zero points"
    return None


def packed_values(weight: QuantizedWeight) -> Array:
    """The whole numbers [in, out]."""
    values = np.ascontiguousarray(weight.read_values().T)
    return (values.astype(np.int8) - np.int8(weight.raised)).astype(ml_dtypes.int4)


def packed_scales(weight: QuantizedWeight) -> Array:
    """The scales [groups, out] in FP32."""
    return np.ascontiguousarray(weight.scales.T).astype(np.float32) * np.float32(weight.outer_scale)
