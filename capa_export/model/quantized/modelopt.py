"""NVIDIA ModelOpt's unified layout: INT4 AWQ, FP8 and NVFP4.

INT4 AWQ: weight u8 [out/2, in], in two's complement, of two outputs the first in the low bits; weight_scale
[out, in/g].
FP8: weight f8_e4m3 [out, in], weight_scale and input_scale of one number.
NVFP4: weight u8 [out, in/2], of two inputs the first in the low bits; weight_scale f8_e4m3 [out, in/16]; weight_scale_2
and input_scale f32 of one number.
INT4 and NVFP4 may have pre_quant_scale [in], which multiplies the layer's input.
"""

from dataclasses import dataclass
from typing import ClassVar

import ml_dtypes
import numpy as np

from capa_export.base.dims import Section
from capa_export.model.quantized.names import matches_any, names
from capa_export.model.quantized.packing import unpacked
from capa_export.model.quantized.parts import FLOATS, Format, Parts, group_size
from capa_export.model.quantized.weight import Array, QuantizedWeight

__all__ = ["Fp8", "Int4Awq", "Nvfp4", "read"]

_SCALAR = ((), (1,))


@dataclass(frozen=True, kw_only=True, slots=True)
class Int4Awq:
    """Four bits in groups."""

    REQUIRED: ClassVar[tuple[str, ...]] = ("weight", "weight_scale")
    OPTIONAL: ClassVar[tuple[str, ...]] = ("pre_quant_scale",)
    SCALES: ClassVar[tuple[str, ...]] = ("weight_scale", "pre_quant_scale")

    group: int
    excluded: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"ModelOpt INT4 AWQ, groups of {self.group}"

    def excludes(self, module: str) -> bool:
        return matches_any(module, self.excluded)

    def shape(self, parts: Parts) -> tuple[int, int]:
        rows, num_inputs = parts.shape("weight")
        groups = num_inputs // group_size(parts, self.group, num_inputs)
        parts.expect("weight", ("uint8",))
        parts.expect("weight_scale", FLOATS, (2 * rows, groups))
        parts.expect("pre_quant_scale", FLOATS, (num_inputs,))
        return 2 * rows, num_inputs

    def decode(self, parts: Parts) -> QuantizedWeight:
        self.shape(parts)

        def values() -> Array:
            # In two's complement, a number with its highest bit turned over is 8 more.
            raised = unpacked(parts.array("weight").T, 4).T ^ np.uint8(8)
            return raised.view(np.int8) - np.int8(8)

        return QuantizedWeight(
            kind="int4",
            read_values=values,
            scales=parts.scales("weight_scale"),
            group_size=self.group,
            pre_scale=parts.scales("pre_quant_scale") if "pre_quant_scale" in parts else None,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Fp8:
    """FP8 with one scale a layer."""

    REQUIRED: ClassVar[tuple[str, ...]] = ("weight", "weight_scale")
    OPTIONAL: ClassVar[tuple[str, ...]] = ("input_scale",)
    SCALES: ClassVar[tuple[str, ...]] = ("weight_scale", "input_scale")

    excluded: tuple[str, ...]

    @property
    def name(self) -> str:
        return "ModelOpt FP8 (E4M3), one scale a layer"

    def excludes(self, module: str) -> bool:
        return matches_any(module, self.excluded)

    def shape(self, parts: Parts) -> tuple[int, int]:
        num_outputs, num_inputs = parts.shape("weight")
        parts.expect("weight", ("float8_e4m3fn",))
        parts.expect("weight_scale", FLOATS, *_SCALAR)
        parts.expect("input_scale", FLOATS, *_SCALAR)
        return num_outputs, num_inputs

    def decode(self, parts: Parts) -> QuantizedWeight:
        num_outputs, num_inputs = self.shape(parts)
        return QuantizedWeight(
            kind="fp8",
            read_values=lambda: parts.array("weight"),
            scales=np.broadcast_to(parts.scales("weight_scale").reshape(1, 1), (num_outputs, 1)),
            group_size=num_inputs,
            input_scale=parts.scalar("input_scale") if "input_scale" in parts else None,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Nvfp4:
    """FP4 in groups whose scales are FP8."""

    REQUIRED: ClassVar[tuple[str, ...]] = ("weight", "weight_scale", "weight_scale_2")
    OPTIONAL: ClassVar[tuple[str, ...]] = ("input_scale", "pre_quant_scale")
    SCALES: ClassVar[tuple[str, ...]] = ("weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale")

    group: int
    excluded: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"ModelOpt NVFP4, groups of {self.group}"

    def excludes(self, module: str) -> bool:
        return matches_any(module, self.excluded)

    def shape(self, parts: Parts) -> tuple[int, int]:
        num_outputs, num_octets = parts.shape("weight")
        num_inputs = 2 * num_octets
        groups = num_inputs // group_size(parts, self.group, num_inputs)
        parts.expect("weight", ("uint8",))
        parts.expect("weight_scale", ("float8_e4m3fn",), (num_outputs, groups))
        parts.expect("weight_scale_2", ("float32",), *_SCALAR)
        parts.expect("input_scale", FLOATS, *_SCALAR)
        parts.expect("pre_quant_scale", FLOATS, (num_inputs,))
        return num_outputs, num_inputs

    def decode(self, parts: Parts) -> QuantizedWeight:
        self.shape(parts)
        return QuantizedWeight(
            kind="nvfp4",
            read_values=lambda: unpacked(parts.array("weight"), 4).view(ml_dtypes.float4_e2m1fn),
            scales=parts.scales("weight_scale"),
            group_size=self.group,
            outer_scale=parts.scalar("weight_scale_2"),
            pre_scale=parts.scales("pre_quant_scale") if "pre_quant_scale" in parts else None,
            input_scale=parts.scalar("input_scale") if "input_scale" in parts else None,
        )


def read(config: Section) -> Format:
    """The settings in `hf_quant_config.json` or, under the same names, in a `quantization_config`.

    Raises:
        CapaError: the algorithm is not known.
    """
    excluded = (*names(config, "exclude_modules"), *names(config, "ignore"))
    algorithm = config.data.get("quant_algo")
    if algorithm == "FP8":
        return Fp8(excluded=excluded)
    if algorithm == "W4A16_AWQ":
        return Int4Awq(group=_group(config, 128), excluded=excluded)
    if algorithm in ("NVFP4", "NVFP4_AWQ", "W4A16_NVFP4"):
        return Nvfp4(group=_group(config, 16), excluded=excluded)
    known = "FP8, NVFP4, NVFP4_AWQ, W4A16_AWQ, W4A16_NVFP4"
    raise config.refused("quant_algo", f"is {algorithm!r}; known algorithms: {known}")


def _group(config: Section, default: int) -> int:
    """The group's size, which `quantization_config` has with the weights of its one group of layers."""
    groups = config.section("config_groups") if config.data.get("config_groups") else Section({}, config.where, "")
    for name in groups.data:
        scheme = groups.section(name)
        if scheme.data.get("weights"):
            return scheme.section("weights").count("group_size", default)
    return config.count("group_size", default)
