"""Numbers of four or eight bits, as formats pack them into words."""

from collections.abc import Sequence

import numpy as np

from capa_export.model.quantized.weight import Array

__all__ = ["signed", "unpacked"]


def unpacked(words: Array, bits: int, order: Sequence[int] | None = None) -> Array:
    """Numbers without sign [..., n], the lowest bits of a word [..., words] first.

    Args:
        words: of 8 or 32 bits.
        bits: of a number, 4 or 8.
        order: the place in a word where its first, second ... number lies, where they are not in order.
    """
    octets = np.ascontiguousarray(words).view(np.uint8)
    numbers = octets
    if bits == 4:
        numbers = np.empty((*octets.shape[:-1], 2 * octets.shape[-1]), np.uint8)
        numbers[..., 0::2], numbers[..., 1::2] = octets & 15, octets >> 4
    if order is None:
        return numbers
    return np.take(numbers.reshape(-1, len(order)), order, axis=1).reshape(numbers.shape)


def signed(numbers: Array, bits: int) -> Array:
    """Numbers that were stored with half of their range added."""
    return (numbers ^ np.uint8(1 << (bits - 1)) if bits == 8 else numbers - np.uint8(8)).view(np.int8)
