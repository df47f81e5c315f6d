"""FP8 with a scale a block of rows and columns, as DeepSeek introduced it and Qwen's `-FP8` checkpoints have it.

weight f8_e4m3 [out, in], weight_scale_inv [out/rows, in/columns], rounded up: blocks at the ends may be smaller.
The scale is what the number is multiplied with, whatever its name says.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from capa_export.base.dims import Section
from capa_export.model.quantized.names import contains_any, names
from capa_export.model.quantized.parts import FLOATS, Parts
from capa_export.model.quantized.weight import QuantizedWeight

__all__ = ["Fp8Blocks"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Fp8Blocks:
    """The settings of a checkpoint in FP8 blocks."""

    REQUIRED: ClassVar[tuple[str, ...]] = ("weight", "weight_scale_inv")
    OPTIONAL: ClassVar[tuple[str, ...]] = ()
    SCALES: ClassVar[tuple[str, ...]] = ("weight_scale_inv",)

    rows: int
    columns: int
    not_converted: tuple[str, ...]

    @classmethod
    def read(cls, config: Section) -> "Fp8Blocks":
        """The settings in a `quantization_config`.

        Raises:
            CapaError: there are no blocks, or inputs have scales that were measured.
        """
        if config.data.get("weight_block_size") is None:
            raise config.refused("weight_block_size", "is missing; FP8 is supported in blocks, or from ModelOpt")
        block = config.counts("weight_block_size", ())
        if len(block) != 2:
            raise config.refused("weight_block_size", f"must be two numbers, not {list(block)}")
        config.expect("fmt", "e4m3")
        config.expect("activation_scheme", "dynamic")
        return cls(rows=block[0], columns=block[1], not_converted=names(config, "modules_to_not_convert"))

    @property
    def name(self) -> str:
        return f"FP8 (E4M3), blocks of {self.rows} x {self.columns}"

    def excludes(self, module: str) -> bool:
        return contains_any(module, self.not_converted)

    def shape(self, parts: Parts) -> tuple[int, int]:
        num_outputs, num_inputs = parts.shape("weight")
        parts.expect("weight", ("float8_e4m3fn",))
        parts.expect("weight_scale_inv", FLOATS, (-(-num_outputs // self.rows), -(-num_inputs // self.columns)))
        return num_outputs, num_inputs

    def decode(self, parts: Parts) -> QuantizedWeight:
        num_outputs, _ = self.shape(parts)
        return QuantizedWeight(
            kind="fp8",
            read_values=lambda: parts.array("weight"),
            scales=np.repeat(parts.scales("weight_scale_inv"), self.rows, axis=0)[:num_outputs],
            group_size=self.columns,
        )
