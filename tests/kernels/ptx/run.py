"""Runs an operator's kernels from their PTX: what `capa_export.kernels.execute` does with Triton."""

from collections.abc import Mapping, Sequence
from functools import cache
from math import prod
from typing import Any

import numpy as np
import torch

from capa_export.base.precision import Precision
from capa_export.kernels import OPERATORS, STEP_OPERATORS
from capa_export.kernels.compile import CompiledKernel, compile_kernels, has_real, variant_name
from capa_export.kernels.operator import Operator
from tests.kernels.ptx.launch import launch, pack
from tests.kernels.ptx.memory import GlobalMemory, KernelError
from tests.kernels.ptx.parse import Kernel, parse

__all__ = ["compiled", "outputs_of", "parsed"]

_REALS: Mapping[torch.dtype, Precision] = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
_DTYPES = {"fp32": torch.float32, "int32": torch.int32, "int64": torch.int64}


@cache
def compiled(capability: str) -> dict[str, CompiledKernel]:
    """PTX of every variant, by its name."""
    kernels = compile_kernels([*OPERATORS, *STEP_OPERATORS], [capability], ptx=True)
    return {one.variant: one for one in kernels if one.kind == "ptx"}


@cache
def parsed(variant: str, capability: str) -> Kernel:
    return parse(compiled(capability)[variant].image.decode())


def as_bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().copy()


def outputs_of(
    operator: Operator,
    inputs: Mapping[str, torch.Tensor],
    *,
    capability: str = "8.0",
    shifts: Mapping[str, int] | None = None,
    missing: Mapping[str, int] | None = None,
    only: Kernel | None = None,
    changed: Sequence[str] = (),
    **attributes: float,
) -> dict[str, torch.Tensor]:
    """The outputs by name.

    Args:
        operator: what to compute.
        inputs: by name, with batch axis.
        capability: GPU that the kernels are compiled for.
        shifts: bytes by which the address of an input misses a multiple of 256.
        missing: bytes that an output lacks at its end.
        changed: inputs that a kernel writes to; the result has what is in them then, too.
        only: the one kernel to run, instead of that of its name; it finds random numbers in scratch memory.
        attributes: of the node.

    Raises:
        KernelError: a kernel does what it may not, or leaves a byte of an output unwritten.
    """
    values = {name: int(inputs[name]) for name in operator.value_inputs}
    size = operator.sizes({name: inputs[name].shape for name in operator.inputs}, values)
    real = next((inputs[name].dtype for name, one in operator.inputs.items() if one.dtype == "real"), torch.float16)
    dtypes: dict[str, Any] = {**_DTYPES, "real": real}
    memory = GlobalMemory()
    arguments: dict[str, float] = dict(attributes)
    for name, tensor in inputs.items():
        if name not in values:
            arguments[name] = memory.add(name, as_bytes(tensor), shift=(shifts or {}).get(name, 0))
    shapes = {
        name: [one if isinstance(one, int) else getattr(size, one) for one in tensor.shape]
        for name, tensor in operator.outputs.items()
    }
    for name, tensor in operator.outputs.items():
        num_bytes = prod(shapes[name]) * dtypes[tensor.dtype].itemsize - (missing or {}).get(name, 0)
        arguments[name] = memory.add(name, np.zeros(num_bytes, np.uint8), written=False)
    generator = np.random.default_rng(0)
    for name, scratch in operator.scratch(size).items():
        assert isinstance(scratch.count, int)
        kinds = {
            "fp32": generator.random(scratch.count, np.float32),
            "int32": generator.integers(2**31, size=scratch.count, dtype=np.int32),
            "int64": generator.integers(2**33, size=scratch.count),
        }
        arguments[name] = memory.add(name, kinds[scratch.dtype], written=only is not None)
    known = {name: getattr(size, name) for name in operator.compiled_sizes}
    for one in operator.launches(size):
        variant = variant_name(one, _REALS[real] if has_real(operator, one) else None, known)
        kernel = parsed(variant, capability)
        if only:
            if only.name != kernel.name:
                continue
            kernel = only
        given = [arguments[arg] if isinstance(arg, str) else arg for arg in one.args]
        given += [0] * compiled(capability)[variant].null_pointers
        if 0 not in one.grid:
            launch(kernel, memory, pack(kernel, given), one.grid, compiled(capability)[variant].shared_bytes)
    for name in operator.outputs:
        if not only and not memory[name].written.all():
            raise KernelError(f"{name}: {int((~memory[name].written).sum())} bytes are not written")
    found = {
        name: torch.from_numpy(memory[name].data).view(dtypes[tensor.dtype]).reshape(shapes[name])
        for name, tensor in operator.outputs.items()
        if not only
    }
    after = {name: torch.from_numpy(memory[name].data).view(inputs[name].dtype) for name in changed}
    return found | {name: one.reshape(inputs[name].shape) for name, one in after.items()}
