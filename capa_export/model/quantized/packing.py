"""Numbers of four or eight bits, as formats pack them into words."""

from collections.abc import Sequence

import numpy as np

from capa_export.model.quantized.weight import Array

__all__ = ["signed", "unpacked"]

_OCTETS = 1 << 16
"""Octets that are unpacked at a time, for the processor's cache."""


def unpacked(words: Array, bits: int, order: Sequence[int] | None = None) -> Array:
    """Numbers without sign [..., n], the lowest bits of a word [..., words] first.

    Args:
        words: of 8 or 32 bits.
        bits: of a number, 4 or 8.
        order: the place in a word where its first, second ... number lies, where they are not in order.
    """
    octets = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8 and order is None:
        return octets
    flat, each = octets.reshape(-1), 8 // bits
    numbers = np.empty((*octets.shape[:-1], each * octets.shape[-1]), np.uint8)
    for start in range(0, flat.size, _OCTETS):
        piece = flat[start : start + _OCTETS]
        found = np.stack([piece & 15, piece >> 4], axis=1) if bits == 4 else piece
        if order is not None:
            found = np.take(found.reshape(-1, len(order)), order, axis=1)
        numbers.reshape(-1)[each * start :][: found.size] = found.reshape(-1)
    return numbers


def signed(numbers: Array, bits: int) -> Array:
    """Numbers that were stored with half of their range added."""
    return (numbers ^ np.uint8(1 << (bits - 1)) if bits == 8 else numbers - np.uint8(8)).view(np.int8)
