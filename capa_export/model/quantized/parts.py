"""The tensors that a quantized checkpoint stores in place of a layer's weight."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from capa_export.base.dims import Section
from capa_export.base.errors import CapaError
from capa_export.model.checkpoint import StoredTensor
from capa_export.model.quantized.weight import Array, QuantizedWeight

__all__ = ["FLOATS", "Format", "Parts", "group_size", "num_bits", "num_words"]

FLOATS = ("float16", "bfloat16", "float32")


@dataclass(frozen=True, slots=True)
class Parts:
    """The stored tensors of one layer, by the last word of their names."""

    module: str
    tensors: Mapping[str, StoredTensor]

    def __contains__(self, part: str) -> bool:
        return part in self.tensors

    def refused(self, part: str, why: str) -> CapaError:
        """The error that a stored tensor is wrong."""
        tensor = self.tensors[part]
        return CapaError(f"{tensor.path}: tensor {tensor.name} {why}")

    def shape(self, part: str, num_axes: int = 2) -> tuple[int, ...]:
        """A part's shape, of so many axes.

        Raises:
            CapaError: it has other axes.
        """
        shape = self.tensors[part].shape
        if len(shape) != num_axes or 0 in shape:
            raise self.refused(part, f"has shape {list(shape)}, where {num_axes} axes are expected")
        return shape

    def expect(self, part: str, dtypes: Sequence[str], *shapes: tuple[int, ...]) -> None:
        """Refuse a part of other dtypes or of none of these shapes; one that is absent is not looked at.

        Raises:
            CapaError: it is so.
        """
        if part not in self:
            return
        tensor = self.tensors[part]
        if tensor.numpy_dtype.name not in dtypes:
            raise self.refused(part, f"is {tensor.numpy_dtype.name}, where {' or '.join(dtypes)} is expected")
        if shapes and tensor.shape not in shapes:
            implied = " or ".join(str(list(shape)) for shape in shapes)
            raise self.refused(part, f"has shape {list(tensor.shape)}, the others imply {implied}; download it again")

    def array(self, part: str) -> Array:
        """A part's numbers, mapped from the file."""
        return self.tensors[part].mapped()

    def scales(self, part: str) -> Array:
        """A part's numbers, none of which may be NaN, infinite or zero.

        Raises:
            CapaError: one is.
        """
        scales = self.array(part)
        numbers = scales.astype(np.float32)
        if not (np.isfinite(numbers) & (numbers != 0)).all():
            raise self.refused(part, "holds scales that are NaN, infinite or zero; the weights are damaged")
        return scales

    def scalar(self, part: str) -> float:
        """The one number of a part that may be absent, 1 then.

        Raises:
            CapaError: it is NaN, infinite or zero.
        """
        return float(self.scales(part).astype(np.float32).reshape(())) if part in self else 1.0


class Format(Protocol):
    """One way of storing quantized weights, with the settings that a checkpoint names."""

    REQUIRED: ClassVar[tuple[str, ...]]
    """Parts that every quantized layer has; the first holds the numbers."""
    OPTIONAL: ClassVar[tuple[str, ...]]
    """Parts that it may have."""
    SCALES: ClassVar[tuple[str, ...]]
    """Parts of which no number may be NaN, infinite or zero."""

    @property
    def name(self) -> str:
        """The format and its settings in words."""
        ...

    def excludes(self, module: str) -> bool:
        """Whether the config says that this layer is not quantized."""
        ...

    def shape(self, parts: Parts) -> tuple[int, int]:
        """Outputs and inputs of a layer; refuses parts that disagree, and reads none that is large."""
        ...

    def decode(self, parts: Parts) -> QuantizedWeight:
        """The weight of a layer."""
        ...


def num_bits(config: Section, key: str = "bits") -> int:
    """The bits of a number.

    Raises:
        CapaError: they are neither 4 nor 8.
    """
    bits = config.count(key)
    if bits not in (4, 8):
        raise config.refused(key, f"is {bits}, only 4 and 8 are supported")
    return bits


def group_size(parts: Parts, size: int | None, num_inputs: int) -> int:
    """Columns of a group, where None stands for all.

    Raises:
        CapaError: they do not divide the layer's inputs.
    """
    if size is None:
        return num_inputs
    if num_inputs % size:
        first = next(iter(parts.tensors.values()))
        raise CapaError(
            f"{first.path}: {parts.module} has {num_inputs} inputs, which groups of {size} do not divide; "
            "use a checkpoint with smaller groups"
        )
    return size


def num_words(numbers: int, bits: int) -> int:
    """Words of 32 bits that hold so many numbers."""
    return math.ceil(numbers * bits / 32)
