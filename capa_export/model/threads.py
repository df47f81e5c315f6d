"""The processor's threads that PyTorch computes a small model with."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["worthwhile_threads"]

_WORTH_SHARING = 1 << 20
"""Weights of a decoder layer from which on its products are worth sharing among threads: to hand over a smaller one
and to wait for its parts takes longer than to compute it, several times as long on a machine that is busy."""


@contextmanager
def worthwhile_threads(model: Any) -> Generator[None]:
    """Compute with one thread until the block ends, where more would make a model of this size slower.

    Args:
        model: a Hugging Face VLM.
    """
    before = torch.get_num_threads()
    layer = model.model.language_model.layers[0]
    if before == 1 or sum(weights.numel() for weights in layer.parameters()) >= _WORTH_SHARING:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
