"""Rotary position tables, computed in the graph from position ids."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import OpBuilder

from capa_export.base.dims import ModelDims

__all__ = ["RotaryTables", "rotary_frequencies", "rotary_tables"]

RotaryTables = Callable[[OpBuilder, ir.Value, ir.DataType], tuple[ir.Value, ir.Value]]
"""A family's position encoding: position ids [axes, T] -> cos and sin [1, T, d/2] in the given dtype."""


def rotary_tables(dims: ModelDims[Any]) -> RotaryTables:
    """Plain RoPE, or mRoPE: time, height and width positions turn some of the frequencies each."""
    decoder = dims.decoder
    half = decoder.head_dim // 2
    frequency = rotary_frequencies(decoder.rope_theta, half)
    axis = np.repeat(np.arange(decoder.position_axes), decoder.mrope_section or half)
    if decoder.mrope_interleaved:
        axis = _interleaved(decoder.mrope_section, half)

    def tables(op: OpBuilder, position_ids: ir.Value, dtype: ir.DataType) -> tuple[ir.Value, ir.Value]:
        position_Td = op.Transpose(op.Gather(position_ids, op.Constant(value=ir.tensor(axis)), axis=0), perm=[1, 0])
        angle_Td = op.Mul(op.Cast(position_Td, to=ir.DataType.FLOAT), op.Constant(value=ir.tensor(frequency)))
        angle_1Td = op.Reshape(angle_Td, [1, -1, half])
        return op.Cast(op.Cos(angle_1Td), to=dtype), op.Cast(op.Sin(angle_1Td), to=dtype)

    return tables


def rotary_frequencies(theta: float, count: int) -> np.ndarray:
    """[count] FP32, theta ** (-i / count): each step in FP32 as transformers has it.

    The power is rounded from FP64, since the last bit of an FP32 power depends on the processor.
    """
    exponent = np.arange(count, dtype=np.float32) / np.float32(count)
    power = (np.float64(theta) ** exponent.astype(np.float64)).astype(np.float32)
    return np.float32(1.0) / power


def _interleaved(sections: Sequence[int], half: int) -> np.ndarray:
    """Axis of each frequency: they take turns while they last, and the time axis has the rest."""
    axis = np.zeros(half, np.int64)
    for index in range(1, len(sections)):
        axis[index : index + len(sections) * sections[index] : len(sections)] = index
    return axis
