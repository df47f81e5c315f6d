"""The operators' kernels: held against their references, then timed over the floor and beside the function bodies."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bodies import BODIES
from cases import Case, skip
from problem import HALVES, Problem, problems
from timing import cuda_timer, measured_chip, timed

from capa_export.base.errors import CapaError
from capa_export.kernels import OPERATORS
from capa_export.kernels.compile import COMPUTE_CAPABILITIES, compile_kernels
from capa_export.kernels.execute import execute

__all__ = ["body_of", "cases"]


def cases(_: Path) -> Iterator[Case]:
    """The kernels as the plugins launch them, the same compiled just in time, and the function bodies."""
    chip = measured_chip(cuda_timer)
    rates = {"copy_GBps": chip.bytes_per_second / 1e9, "product_TFLOPps": chip.flops_per_second / 1e12}
    yield "this GPU", lambda: rates
    try:
        from capa_export.kernels.plugins.launcher import Launcher
    except CapaError as error:
        yield "kernels", partial(skip, str(error))
        return
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    known = capability in COMPUTE_CAPABILITIES
    launcher = Launcher(compile_kernels(OPERATORS, [capability], head_sizes=[128]) if known else None)
    graph_ms: dict[str, float] = {}

    def kernel(problem: Problem) -> dict[str, Any]:
        outputs, launch = _launched(problem, launcher)
        launch()
        problem.check(tuple(outputs.values()))
        times = timed(launch, cuda_timer)
        graph_ms[problem.name] = times["graph_ms"]
        floor = chip.floor_ms(problem.operator.cost(problem.size))
        return {**times, "floor_ms": floor, "over_floor": times["graph_ms"] / floor}

    def just_in_time(problem: Problem) -> dict[str, Any]:
        outputs, launch = _launched(problem, launcher)
        launch()
        theirs = execute(problem.operator, problem.inputs, **problem.attributes)
        # Compiled for sizes that it knows, it may add in another order.
        problem.check(tuple(theirs.values()))
        same = all(
            torch.equal(theirs[name].view(torch.uint8), ours.view(torch.uint8)) for name, ours in outputs.items()
        )
        return {"bits": "equal" if same else "differ"}

    def body(problem: Problem, *, compiled: bool) -> dict[str, Any]:
        run = body_of(problem, compiled=compiled)
        problem.check(run())
        times = timed(run, cuda_timer)
        measured = graph_ms.get(problem.name)
        return {**times, "times_kernel": times["graph_ms"] / measured} if measured else {**times}

    everything = {
        "kernels": kernel,
        "just in time": just_in_time,
        "body": partial(body, compiled=False),
        "body, compiled": partial(body, compiled=True),
    }
    # What matters most first: the last may not be reached in time.
    for what, measure in everything.items():
        for problem in problems():
            if what == "body, compiled" and problem.half != "fp16":
                # Compiling takes seconds, and of bf16 gives the same kernels.
                continue
            yield f"{problem.name}: {what}", partial(measure, problem)


def body_of(problem: Problem, *, compiled: bool) -> Callable[[], Any]:
    """The function body on a problem's inputs, as torch runs it or as torch compiles it."""
    function = BODIES[problem.operator.name]
    if compiled:
        # Its limit of compilations counts those of other sizes.
        torch.compiler.reset()
        function = torch.compile(function, dynamic=False, fullgraph=True)
    return partial(function, **problem.graph_inputs)


def _launched(problem: Problem, launcher: Any) -> tuple[dict[str, torch.Tensor], Callable[[], None]]:
    """The outputs, and what computes them: kernels compiled ahead of time, launched as the plugins do."""
    from capa_export.kernels.plugins.launcher import scratch_offsets

    operator, size = problem.operator, problem.size
    dtypes = {"real": HALVES[problem.half], "fp32": torch.float32, "int64": torch.int64}
    calls = launcher.prepare(operator, problem.half, size)
    offsets, num_bytes = scratch_offsets(operator, size)
    scratch = _poisoned(num_bytes)
    outputs: dict[str, torch.Tensor] = {}
    for name, tensor in operator.outputs.items():
        shape = [one if isinstance(one, int) else getattr(size, one) for one in tensor.shape]
        dtype = dtypes[tensor.dtype]
        outputs[name] = _poisoned(torch.Size(shape).numel() * dtype.itemsize).view(dtype).reshape(shape)
    tensors = {**problem.inputs, **outputs, **{name: scratch[offset:] for name, offset in offsets.items()}}

    def launch() -> None:
        addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
        launcher.launch(operator, calls, {**addresses, **problem.attributes}, torch.cuda.current_stream().cuda_stream)

    return outputs, launch


def _poisoned(num_bytes: int) -> torch.Tensor:
    """Memory that holds no number in any float: what a kernel forgets to write then shows."""
    return torch.full((num_bytes,), 255, dtype=torch.uint8, device="cuda")
