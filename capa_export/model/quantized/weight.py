"""The canonical form of a quantized weight, into which every format is decoded."""

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from capa_export.base.weight_types import NumberKind

__all__ = ["Array", "QuantizedWeight"]

Array: TypeAlias = np.ndarray[Any, Any]
_ROWS, _COLUMNS = 64, 256
"""Rows that a thread dequantizes at a time, and columns of them that it reads, for the processor's caches."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizedWeight:
    """The weight of a linear layer as numbers of few bits and what they are multiplied with.

    Of input i and output o in group g: pre_scale[i] * outer_scale * scales[o, g] * (values[o, i] - zero_points[o, g]).
    """

    kind: NumberKind
    """Of the values."""
    read_values: Callable[[], Array]
    """Reads the values [out, in]: whole numbers, or FP8 or FP4 numbers; a group's columns lie side by side."""
    scales: Array
    """Scales [out, groups] in their stored dtype; one group is a scale a channel."""
    group_size: int
    """Columns of a group; the last group may have fewer."""
    zero_points: Array | None = None
    """Whole numbers [out, groups]; None where the values are symmetric."""
    raised: int = 0
    """What whole numbers without sign, and their zero points, are above numbers with a sign."""
    outer_scale: float = 1.0
    """FP32 scale of the scales."""
    pre_scale: Array | None = None
    """Factors [in] of the layer's input."""
    input_order: Array | None = None
    """The input [in] that every column belongs to; None where column i is of input i."""
    input_scale: float | None = None
    """Scale that the format quantizes the layer's input with; the weight does not depend on it."""

    def dequantized(self, out: Array | None = None) -> Array:
        """The weight [out, in] in FP32, by inputs in their own order.

        Args:
            out: receives it, contiguous; new memory by default, which can take a system as long to give.
        """
        values = self.read_values()
        scales = self.scales.astype(np.float32) * np.float32(self.outer_scale)
        (outputs, inputs), groups = values.shape, scales.shape[1]
        columns = groups * self.group_size
        weight = np.empty((outputs, inputs), np.float32) if out is None else out
        as_stored = self.input_order is None and columns == inputs
        numbers = weight if as_stored else np.empty((outputs, columns), np.float32)

        def fill(start: int) -> None:
            rows = slice(start, start + _ROWS)
            filled = numbers[rows]
            for first in range(0, inputs, _COLUMNS):
                part = slice(first, min(first + _COLUMNS, inputs))
                # Row by row even where the values lie column by column.
                filled[:, part] = np.ascontiguousarray(values[rows, part])
            filled[:, inputs:] = 0
            grouped = filled.reshape(-1, groups, self.group_size)
            if self.zero_points is not None:
                grouped -= self.zero_points[rows, :, None].astype(np.float32)
            grouped *= scales[rows, :, None]

        with ThreadPoolExecutor(os.cpu_count()) as threads:
            deque(threads.map(fill, range(0, outputs, _ROWS)), maxlen=0)
        if not as_stored:
            weight[:, slice(None) if self.input_order is None else self.input_order] = numbers[:, :inputs]
        if self.pre_scale is not None:
            weight *= self.pre_scale.astype(np.float32)
        return weight
