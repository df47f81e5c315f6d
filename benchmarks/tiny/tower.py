"""Start values of a vision transformer with learned position embeddings."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["start_tower"]


def _grid_positions(side: int, width: int) -> Tensor:
    """Sines and cosines of row and column, [side * side, width]."""
    quarter = width // 4
    frequencies = torch.pi * (2.0 / side) ** (torch.arange(quarter) / quarter)
    angles = torch.arange(side)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, cols = waves.repeat_interleave(side, dim=0), waves.repeat(side, 1)
    return torch.cat([rows, cols], dim=1)


@torch.no_grad()
def start_tower(tower: Any, projector: Any, positions: Tensor) -> None:
    """Matrices whose outputs have the deviation of their inputs, and positions that say where they are.

    Args:
        tower: the vision tower.
        projector: from the tower to the decoder.
        positions: the tower's position embeddings [1 + side * side, width], the class token's first.
    """
    for module in (tower, projector):
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
    count, width = positions.shape
    positions.copy_(torch.cat([torch.zeros(1, width), _grid_positions(int((count - 1) ** 0.5), width)]))
