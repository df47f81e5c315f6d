"""Several processes that train one model, started by `torchrun`; without it there is one."""

from collections.abc import Sequence

import torch
from torch import Tensor, distributed

__all__ = ["average", "join", "num_processes", "rank"]


def join() -> None:
    """Meets the other processes, where there are some."""
    if distributed.is_torchelastic_launched():
        distributed.init_process_group("gloo")


def rank() -> int:
    """The number of this process, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def num_processes() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


@torch.no_grad()
def average(tensors: Sequence[Tensor]) -> None:
    """Over the processes, in place."""
    if num_processes() == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    distributed.all_reduce(flat)
    means = (flat / num_processes()).split([tensor.numel() for tensor in tensors])
    for tensor, mean in zip(tensors, means, strict=True):
        tensor.copy_(mean.view_as(tensor))
