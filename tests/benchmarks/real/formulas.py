"""What is expected of a published decoder, computed plainly."""

import numpy as np
from numpy.typing import NDArray

__all__ = ["dequantised_q4_1"]


def dequantised_q4_1(blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Weights [rows, columns] from rows of GGUF's Q4_1 blocks.

    A block of 20 bytes holds 32 weights: scale d and minimum m as FP16, then the low halves of 16 bytes and their
    high halves as the factors q of q * d + m.
    """
    of_block = np.ascontiguousarray(blocks).reshape(-1, 20)
    d, m = of_block[:, :4].copy().view(np.float16).astype(np.float32).T
    packed = of_block[:, 4:]
    factors = np.concatenate([packed & 15, packed >> 4], axis=1).astype(np.float32)
    return (factors * d[:, None] + m[:, None]).reshape(len(blocks), -1)
