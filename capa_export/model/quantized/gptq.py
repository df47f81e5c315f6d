"""GPTQ: whole numbers without sign, packed along the inputs in order, `g_idx` for the group of every input.

qweight i32 [in*bits/32, out], qzeros i32 [groups, out*bits/32], scales [groups, out], g_idx i32 [in]. The first version
of the layout stores zero points less one, within their bits.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from capa_export.base.dims import Section
from capa_export.model.quantized.names import contains_any, is_any, names, patterns
from capa_export.model.quantized.packing import unpacked
from capa_export.model.quantized.parts import FLOATS, Parts, group_size, num_bits
from capa_export.model.quantized.weight import Array, QuantizedWeight

__all__ = ["Gptq", "input_order"]

_FIRST_ZERO = {"gptq": 1, "gptq_v2": 0}
"""By the layout's version, the zero point that is stored as 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gptq:
    """The settings of a checkpoint by AutoGPTQ or GPTQModel."""

    REQUIRED: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales")
    OPTIONAL: ClassVar[tuple[str, ...]] = ("g_idx",)
    SCALES: ClassVar[tuple[str, ...]] = ("scales",)

    bits: int
    group: int | None
    ordered: bool
    """Whether groups are of inputs in the order of their activations."""
    symmetric: bool
    """Whether zero points are said to be in the middle, where they cost nothing."""
    first_zero: int
    not_converted: tuple[str, ...]
    left_out: tuple[str, ...]
    """Expressions of layers, as GPTQModel's `dynamic` leaves them out."""

    @classmethod
    def read(cls, config: Section) -> "Gptq":
        """The settings in a `quantization_config`.

        Raises:
            CapaError: they are of another version or of other bits.
        """
        version, ordered = config.data.get("checkpoint_format"), config.data.get("desc_act")
        version = "gptq" if version in (None, "") else version
        if not isinstance(version, str) or version not in _FIRST_ZERO:
            raise config.refused("checkpoint_format", f"is {version!r:.80}, only 'gptq' and 'gptq_v2' are supported")
        if not isinstance(ordered, bool | None):
            raise config.refused("desc_act", f"must be true or false, not {ordered!r:.80}")
        dynamic = config.section("dynamic").data if config.data.get("dynamic") else {}
        if not all(name.startswith("-:") for name in dynamic):
            raise config.refused("dynamic", "gives layers settings of their own, which is not supported")
        group = config.data.get("group_size", 128)
        return cls(
            bits=num_bits(config),
            group=None if group == -1 else config.count("group_size", 128),
            ordered=bool(ordered),
            symmetric=config.data.get("sym") is not False,
            first_zero=_FIRST_ZERO[version],
            not_converted=names(config, "modules_to_not_convert"),
            left_out=patterns(config, "dynamic", [f"re:{name[2:]}" for name in dynamic]),
        )

    @property
    def name(self) -> str:
        groups = f"groups of {self.group}" if self.group else "one scale a channel"
        return f"GPTQ, {self.bits} bits, {groups}" + (", inputs by activation (desc_act)" if self.ordered else "")

    def excludes(self, module: str) -> bool:
        return contains_any(module, self.not_converted) or is_any(module, self.left_out)

    def shape(self, parts: Parts) -> tuple[int, int]:
        rows, num_outputs = parts.shape("qweight")
        num_inputs = rows * 32 // self.bits
        groups = num_inputs // group_size(parts, self.group, num_inputs)
        parts.expect("qweight", ("int32",))
        parts.expect("scales", FLOATS, (groups, num_outputs))
        parts.expect("qzeros", ("int32",), (groups, num_outputs * self.bits // 32))
        parts.expect("g_idx", ("int32", "int64"), (num_inputs,))
        if num_outputs * self.bits % 32:
            raise parts.refused("qweight", f"has {num_outputs} outputs, whose zero points fill no words of 32 bits")
        if "g_idx" in parts:
            input_order(parts, "g_idx", num_inputs // groups)
        if self.ordered and "g_idx" not in parts:
            raise parts.refused("qweight", "has no g_idx beside it, though desc_act is set; download it again")
        return num_outputs, num_inputs

    def decode(self, parts: Parts) -> QuantizedWeight:
        _, num_inputs = self.shape(parts)
        size = group_size(parts, self.group, num_inputs)
        zeros = unpacked(parts.array("qzeros"), self.bits).T + np.uint8(self.first_zero)
        order = input_order(parts, "g_idx", size) if "g_idx" in parts else None

        def values() -> Array:
            numbers = unpacked(parts.array("qweight").T, self.bits)
            return numbers if order is None else numbers[:, order]

        return QuantizedWeight(
            kind="int4" if self.bits == 4 else "int8",
            read_values=values,
            raised=1 << (self.bits - 1),
            zero_points=zeros & np.uint8((1 << self.bits) - 1),
            scales=parts.scales("scales").T,
            group_size=size,
            input_order=order,
        )


def input_order(parts: Parts, part: str, size: int) -> Array | None:
    """The inputs group by group, by the group of every input; None where they are in order already.

    Raises:
        CapaError: the groups are not all of this size.
    """
    groups = parts.array(part)
    order = np.argsort(groups, kind="stable")
    if not np.array_equal(groups[order], np.arange(len(groups)) // size):
        raise parts.refused(part, f"does not put {size} inputs into every group; the weights are damaged")
    return None if np.array_equal(order, np.arange(len(order))) else order
