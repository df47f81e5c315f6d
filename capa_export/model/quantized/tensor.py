"""A quantized weight in the place of a checkpoint's tensor."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from capa_export.model.checkpoint import CHUNK_ELEMENTS, StoredTensor
from capa_export.model.quantized.packed import BlockForm, block_form
from capa_export.model.quantized.weight import Array, QuantizedWeight

__all__ = ["QuantizedTensor", "quantization"]


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizedTensor(StoredTensor):
    """The weight of a linear layer, of few bits; it is decoded whenever it is read."""

    @property
    def format_name(self) -> str:
        """What its numbers are, in words."""
        raise NotImplementedError

    def quantized(self) -> QuantizedWeight:
        """The weight in the canonical form.

        Raises:
            CapaError: its scales are damaged.
        """
        raise NotImplementedError

    def block_form(self) -> BlockForm | str:
        """How graphs hold its numbers as they are, or why they cannot."""
        return block_form(self.quantized())

    def mapped(self) -> Array:
        """The weight [out, in] in FP32, in memory of its own."""
        return self.quantized().dequantized()

    def chunks(self, size: int = CHUNK_ELEMENTS) -> Iterator[Array]:
        """Yield the elements in storage order, flat, `size` at a time."""
        flat = self.mapped().reshape(-1)
        return (flat[start : start + size] for start in range(0, flat.size, size))


def quantization(tensors: Iterable[StoredTensor]) -> str | None:
    """What the quantized ones among these are, in words; None where there are none."""
    weights = [tensor for tensor in tensors if isinstance(tensor, QuantizedTensor)]
    return f"{len(weights)} layers of {weights[0].format_name}" if weights else None
