"""Runs a kernel over a grid, some blocks at a time."""

import struct
from collections.abc import Sequence

import numpy as np

from tests.kernels.ptx.access import ACCESS
from tests.kernels.ptx.machine import Machine
from tests.kernels.ptx.memory import GlobalMemory
from tests.kernels.ptx.parse import Kernel
from tests.kernels.ptx.warpgroups import WARPGROUPS
from tests.kernels.ptx.warps import WARPS

__all__ = ["launch", "pack"]

_LANES_AT_ONCE = 2048


def pack(kernel: Kernel, values: Sequence[float]) -> list[bytes]:
    """Arguments as a launch passes them: by address, each read at the size of its parameter."""
    formats = {"u64": "<Q", "u32": "<i", "f32": "<f"}
    return [struct.pack(formats[kind], one) for kind, one in zip(kernel.parameters.values(), values, strict=True)]


def launch(
    kernel: Kernel, memory: GlobalMemory, arguments: Sequence[bytes], grid: Sequence[int], shared_bytes: int
) -> None:
    """Run a kernel over a grid.

    Raises:
        KernelError: it does what it may not.
    """
    memory.launches += 1
    blocks = np.arange(int(np.prod(grid)))
    at_once = max(1, _LANES_AT_ONCE // kernel.threads)
    parameters = dict(zip(kernel.parameters, arguments, strict=True))
    for part in np.split(blocks, range(at_once, blocks.size, at_once)):
        Machine(kernel, memory, parameters, grid, part, shared_bytes, ACCESS | WARPS | WARPGROUPS).run()
