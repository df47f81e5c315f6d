"""AutoAWQ's `gemm` layout: four bits without sign, packed along the outputs in an order of their own.

qweight i32 [in, out/8], qzeros i32 [in/g, out/8], scales [in/g, out]; bits 4k of a word hold output `_SLOTS[k]`.
"""

from dataclasses import dataclass
from typing import ClassVar

from capa_export.base.dims import Section
from capa_export.model.quantized.names import contains_any, names
from capa_export.model.quantized.packing import unpacked
from capa_export.model.quantized.parts import FLOATS, Parts, group_size, num_bits
from capa_export.model.quantized.weight import Array, QuantizedWeight

__all__ = ["Awq"]

_SLOTS = (0, 2, 4, 6, 1, 3, 5, 7)
_PLACES = tuple(map(_SLOTS.index, range(8)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Awq:
    """The settings of a checkpoint by AutoAWQ."""

    REQUIRED: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales")
    OPTIONAL: ClassVar[tuple[str, ...]] = ()
    SCALES: ClassVar[tuple[str, ...]] = ("scales",)

    group: int | None
    not_converted: tuple[str, ...]

    @classmethod
    def read(cls, config: Section) -> "Awq":
        """The settings in a `quantization_config`.

        Raises:
            CapaError: they are of another layout or of other bits.
        """
        version = str(config.data.get("version", "gemm")).lower()
        if version != "gemm":
            raise config.refused("version", f"is {version!r}, only 'gemm' is supported")
        if num_bits(config) != 4:
            raise config.refused("bits", "is 8, and AutoAWQ's gemm layout has only 4")
        group = config.data.get("group_size", 128)
        return cls(
            group=None if group == -1 else config.count("group_size", 128),
            not_converted=names(config, "modules_to_not_convert"),
        )

    @property
    def name(self) -> str:
        groups = f"groups of {self.group}" if self.group else "one scale a channel"
        return f"AutoAWQ, 4 bits, {groups}, with zero points"

    def excludes(self, module: str) -> bool:
        return contains_any(module, self.not_converted)

    def shape(self, parts: Parts) -> tuple[int, int]:
        num_inputs, num_words = parts.shape("qweight")
        num_outputs = 8 * num_words
        groups = num_inputs // group_size(parts, self.group, num_inputs)
        parts.expect("qweight", ("int32",))
        parts.expect("qzeros", ("int32",), (groups, num_words))
        parts.expect("scales", FLOATS, (groups, num_outputs))
        return num_outputs, num_inputs

    def decode(self, parts: Parts) -> QuantizedWeight:
        _, num_inputs = self.shape(parts)

        def values() -> Array:
            return unpacked(parts.array("qweight"), 4, _PLACES).T

        return QuantizedWeight(
            kind="int4",
            read_values=values,
            raised=8,
            zero_points=unpacked(parts.array("qzeros"), 4, _PLACES).T,
            scales=parts.scales("scales").T,
            group_size=group_size(parts, self.group, num_inputs),
        )
