"""Times work on the GPU, and knows the least time that it could take."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

import torch

from capa_export.kernels.operator import Cost

__all__ = ["CHIPS", "Chip", "Timer", "cuda_timer", "in_graph", "measured_chip", "timed", "wall_milliseconds"]

Timer = Callable[..., float]
"""Work, and whether the GPU is `busy` when it is launched -> milliseconds."""

_L2_BYTES = 256 << 20
_WARM_UP, _ROUNDS = 3, 25


@dataclass(frozen=True)
class Chip:
    """The figures of a chip that bound any kernel."""

    bytes_per_second: float
    flops_per_second: float
    """Dense FP16 products, FP32 accumulation."""

    def floor_ms(self, cost: Cost) -> float:
        """The least that any kernel takes."""
        return 1e3 * max(cost.bytes / self.bytes_per_second, cost.flops / self.flops_per_second)


CHIPS = {
    "A100 SXM 80 GB": Chip(2.039e12, 312e12),
    "H100 SXM": Chip(3.35e12, 989e12),
    "H200": Chip(4.8e12, 989e12),
    "RTX 4090": Chip(1.008e12, 165.2e12),
    "RTX 5090": Chip(1.792e12, 209.5e12),
}
"""Chips with the figures of their data sheets."""


def cuda_timer(work: Callable[[], object], *, busy: bool) -> float:
    """Median of the work's time on the GPU, with nothing of it in the L2 cache.

    Args:
        work: puts kernels on the current stream.
        busy: whether it waits behind other work, so that launching it costs no time; else the GPU waits for it.
    """
    evicting = torch.empty(_L2_BYTES, dtype=torch.uint8, device="cuda")
    for _ in range(_WARM_UP):
        work()
    milliseconds: list[float] = []
    for _ in range(_ROUNDS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        evicting.zero_()
        if not busy:
            torch.cuda.synchronize()
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        milliseconds.append(begin.elapsed_time(end))
    return median(milliseconds)


def in_graph(work: Callable[[], object]) -> Callable[[], None]:
    """Capture work as one CUDA graph, whose launch is a single one."""
    # What is compiled or allocated at the first call cannot be captured.
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def timed(
    work: Callable[[], object],
    timer: Timer,
    graph: Callable[[Callable[[], object]], Callable[[], object]] = in_graph,
) -> dict[str, float]:
    """Milliseconds launched on an idle GPU, and as one CUDA graph behind other work, where launching takes nothing."""
    return {"ms": timer(work, busy=False), "graph_ms": timer(graph(work), busy=True)}


def measured_chip(timer: Timer) -> Chip:
    """The GPU's rates as it copies a GiB, and multiplies matrices of 8192 x 8192 in FP16."""
    source, target = (torch.empty(1 << 30, dtype=torch.uint8, device="cuda") for _ in range(2))
    copy_ms = timer(lambda: target.copy_(source), busy=True)
    size = 8192
    left, right = (torch.randn(size, size, dtype=torch.float16, device="cuda") for _ in range(2))
    product_ms = timer(lambda: left @ right, busy=True)
    return Chip(2e3 * source.numel() / copy_ms, 2e3 * size**3 / product_ms)


def wall_milliseconds(run: Callable[[], object], rounds: int) -> float:
    """Median on the clock of what waits for the GPU itself."""

    def seconds() -> Iterator[float]:
        for _ in range(rounds):
            started = time.perf_counter()
            run()
            yield time.perf_counter() - started

    for _ in range(_WARM_UP):
        run()
    return 1e3 * median(seconds())
