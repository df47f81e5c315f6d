"""A quantized weight in the place of a checkpoint's tensor."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from capa_export.model.checkpoint import CHUNK_ELEMENTS, StoredTensor
from capa_export.model.quantized.packed import BlockForm, block_form
from capa_export.model.quantized.weight import Array, QuantizedWeight

__all__ = ["HEAD", "QuantizedTensor", "quantization"]

HEAD = "lm_head.weight"
"""The graph's name of the LM head's weight, with which its stored names end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizedTensor(StoredTensor):
    """The weight of a linear layer, of few bits; it is decoded whenever it is read."""

    @property
    def of_tower(self) -> bool:
        """Whether it was asked for as one of the vision tower's, apart from the decoder's layers."""
        return False

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

    def write(self, out: Array) -> None:
        """Write the weight [out, in] to an array in FP32."""
        out[...] = self.mapped()

    def chunks(self, size: int = CHUNK_ELEMENTS) -> Iterator[Array]:
        """Yield the elements in storage order, flat, `size` at a time."""
        flat = self.mapped().reshape(-1)
        return (flat[start : start + size] for start in range(0, flat.size, size))


def quantization(tensors: Mapping[str, StoredTensor]) -> str | None:
    """What the quantized ones among a checkpoint's tensors are, in words; None where there are none."""
    weights = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, QuantizedTensor)}
    heads = [f"the LM head in {weights.pop(name).format_name}" for name in list(weights) if name.endswith(HEAD)]
    tower = [weights.pop(name).format_name for name in list(weights) if weights[name].of_tower]
    layers = [f"{len(weights)} layers of {next(iter(weights.values())).format_name}"] if weights else []
    tower = [f"{len(tower)} products of the vision tower in {tower[0]}"] if tower else []
    return " and ".join([*layers, *heads, *tower]) or None
