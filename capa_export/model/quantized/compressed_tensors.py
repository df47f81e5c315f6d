"""compressed-tensors' `pack-quantized`: whole numbers, stored with half of their range added, packed along the inputs.

weight_packed i32 [out, in*bits/32], weight_scale [out, groups], weight_shape i64 [2], weight_zero_point i32
[out*bits/32, groups], packed along the outputs and also raised, and weight_g_idx i32 [in].
"""

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np

from capa_export.base.dims import Section
from capa_export.base.errors import CapaError
from capa_export.model.quantized.gptq import input_order
from capa_export.model.quantized.names import is_any, names, patterns
from capa_export.model.quantized.packing import signed, unpacked
from capa_export.model.quantized.parts import FLOATS, Parts, group_size, num_bits, num_words
from capa_export.model.quantized.weight import Array, QuantizedWeight

__all__ = ["PackQuantized"]

_FORMAT = "pack-quantized"


@dataclass(frozen=True, kw_only=True, slots=True)
class PackQuantized:
    """The settings of a checkpoint by llm-compressor."""

    REQUIRED: ClassVar[tuple[str, ...]] = ("weight_packed", "weight_scale", "weight_shape")
    OPTIONAL: ClassVar[tuple[str, ...]] = ("weight_zero_point", "weight_g_idx")
    SCALES: ClassVar[tuple[str, ...]] = ("weight_scale",)

    bits: int
    strategy: str
    group: int | None
    symmetric: bool
    ignored: tuple[str, ...]

    @classmethod
    def read(cls, config: Section) -> "PackQuantized":
        """The settings in a `quantization_config`.

        Raises:
            CapaError: layers differ in theirs, or they are not supported.
        """
        groups = config.section("config_groups")
        schemes = [groups.section(name) for name in groups.data]
        if not schemes:
            raise config.refused("config_groups", "is empty; use the config.json that was published with the weights")
        for scheme in schemes:
            if (form := scheme.data.get("format") or config.data.get("format")) != _FORMAT:
                raise config.refused("format", f"is {form!r}, only {_FORMAT!r} is supported")
            if scheme.data.get("input_activations"):
                raise scheme.refused("input_activations", "quantizes inputs, which is not supported in this format")
        settings = [_settings(scheme.section("weights")) for scheme in schemes]
        if any(other != settings[0] for other in settings):
            raise config.refused("config_groups", "gives layers different settings; only one for all is supported")
        return cls(**settings[0], ignored=patterns(config, "ignore", names(config, "ignore")))

    @property
    def name(self) -> str:
        scales = {"group": f"groups of {self.group}", "channel": "one scale a channel", "tensor": "one scale a layer"}
        zeros = "" if self.symmetric else ", with zero points"
        return f"compressed-tensors {_FORMAT}, {self.bits} bits, {scales[self.strategy]}{zeros}"

    def excludes(self, module: str) -> bool:
        return is_any(module, self.ignored)

    def shape(self, parts: Parts) -> tuple[int, int]:
        parts.expect("weight_shape", ("int64", "int32"), (2,))
        num_outputs, num_inputs = map(int, parts.array("weight_shape"))
        parts.expect("weight_packed", ("int32",), (num_outputs, num_words(num_inputs, self.bits)))
        groups = num_inputs // group_size(parts, self.group, num_inputs)
        scales = [(1,), (1, 1)] if self.strategy == "tensor" else [(num_outputs, groups)]
        scales += [(num_outputs,)] if self.strategy == "channel" else []
        parts.expect("weight_scale", FLOATS, *scales)
        parts.expect("weight_zero_point", ("int32",), (num_words(num_outputs, self.bits), groups))
        parts.expect("weight_g_idx", ("int32", "int64"), (num_inputs,))
        if "weight_g_idx" in parts:
            input_order(parts, "weight_g_idx", num_inputs // groups)
        if self.symmetric != ("weight_zero_point" not in parts):
            state = "is there, though weights are symmetric" if self.symmetric else "is missing"
            path = parts.tensors["weight_packed"].path
            raise CapaError(f"{path}: tensor {parts.module}.weight_zero_point {state}; download it again")
        return num_outputs, num_inputs

    def decode(self, parts: Parts) -> QuantizedWeight:
        num_outputs, num_inputs = self.shape(parts)
        size = group_size(parts, self.group, num_inputs)
        order = input_order(parts, "weight_g_idx", size) if "weight_g_idx" in parts else None
        zeros = None
        if "weight_zero_point" in parts:
            zeros = signed(unpacked(parts.array("weight_zero_point").T, self.bits)[:, :num_outputs], self.bits).T
        scales = parts.scales("weight_scale")

        def values() -> Array:
            numbers = signed(unpacked(parts.array("weight_packed"), self.bits)[:, :num_inputs], self.bits)
            return numbers if order is None else numbers[:, order]

        return QuantizedWeight(
            kind="int4" if self.bits == 4 else "int8",
            read_values=values,
            zero_points=zeros,
            scales=np.broadcast_to(scales.reshape(-1, 1), (num_outputs, 1)) if self.group is None else scales,
            group_size=size,
            input_order=order,
        )


def _settings(weights: Section) -> dict[str, Any]:
    """What a scheme says about weights.

    Raises:
        CapaError: the numbers are not whole, or scales are for something else than groups, channels or a layer.
    """
    weights.expect("type", "int")
    strategy = weights.data.get("strategy") or ("group" if weights.data.get("group_size") else "tensor")
    if strategy not in ("group", "channel", "tensor"):
        raise weights.refused("strategy", f"is {strategy!r}, only 'group', 'channel' and 'tensor' are supported")
    symmetric = weights.data.get("symmetric", True)
    if strategy == "tensor" and not symmetric:
        raise weights.refused("symmetric", "is False, which is supported for groups and channels only")
    return {
        "bits": num_bits(weights, "num_bits"),
        "strategy": cast("str", strategy),
        "group": weights.count("group_size") if strategy == "group" else None,
        "symmetric": bool(symmetric),
    }
