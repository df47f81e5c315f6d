"""The precisions of weights and activations, with what ONNX, PyTorch and safetensors call them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = ["FORMATS", "FP16_MAX", "Format", "HalfPrecision", "Precision"]

Precision = Literal["fp16", "bf16", "fp32"]
HalfPrecision = Literal["fp16", "bf16"]

FP16_MAX = 65504.0
"""The largest FP16 number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """A floating-point format."""

    onnx: str
    """Its member of ONNX's data types."""
    array: str
    """Its name in PyTorch, and in NumPy with ml_dtypes."""
    safetensors: str
    num_bytes: int
    epsilon: float
    """Gap between 1 and the next number."""


FORMATS: Mapping[str, Format] = {
    "fp32": Format(onnx="FLOAT", array="float32", safetensors="F32", num_bytes=4, epsilon=2.0**-23),
    "fp16": Format(onnx="FLOAT16", array="float16", safetensors="F16", num_bytes=2, epsilon=2.0**-10),
    "bf16": Format(onnx="BFLOAT16", array="bfloat16", safetensors="BF16", num_bytes=2, epsilon=2.0**-7),
}
"""By precision."""
