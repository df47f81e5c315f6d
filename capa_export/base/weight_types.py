"""The types of few bits that graphs hold weights in, with what ONNX and NumPy call them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = ["WEIGHT_TYPES", "NumberKind", "PackedLayers", "WeightType"]

NumberKind = Literal["int4", "int8", "fp8", "nvfp4"]


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightType:
    """A type of few bits, and how graphs scale its numbers."""

    name: str
    """In sentences."""
    bits: int
    array: str
    """Its name in NumPy with ml_dtypes."""
    onnx: str
    """The member of ONNX's data types that an initializer has; NVFP4 lies in octets, since no kernel reads it."""
    largest: float
    """What the largest number of a group becomes."""
    groups: tuple[int, ...] = ()
    """Inputs that may share a scale, the last by default; empty where all inputs of an output have one."""
    stays: bool = False
    """Whether published weights stay in it unless `--quantize` says otherwise."""
    first_capability: tuple[int, int] = (0, 0)
    """The first compute capability that has it; of any that TensorRT builds for, if none is given."""

    @property
    def in_engines(self) -> bool:
        """Whether TensorRT multiplies with such weights as they are stored; it dequantizes NVFP4 at each run."""
        return self.onnx != "UINT8"


WEIGHT_TYPES: Mapping[str, WeightType] = {
    "int4": WeightType(name="INT4", bits=4, array="int4", onnx="INT4", largest=7, groups=(32, 64, 128), stays=True),
    "int8": WeightType(name="INT8", bits=8, array="int8", onnx="INT8", largest=127),
    "fp8": WeightType(
        name="FP8", bits=8, array="float8_e4m3fn", onnx="FLOAT8E4M3FN", largest=448, first_capability=(8, 9)
    ),
    "nvfp4": WeightType(
        name="NVFP4", bits=4, array="float4_e2m1fn", onnx="UINT8", largest=6, groups=(16,), first_capability=(10, 0)
    ),
}
"""By the word of `--quantize`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedLayers:
    """What graphs hold the weights of a decoder's layers in."""

    kind: NumberKind
    group: int | None
    """Inputs that share a scale; None where all inputs of an output do."""
    has_zeros: bool = False
    """Whether groups have zero points, each as a number beside its scale."""

    @property
    def type(self) -> WeightType:
        """The type of the numbers."""
        return WEIGHT_TYPES[self.kind]
