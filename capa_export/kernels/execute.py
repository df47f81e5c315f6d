"""Runs an operator's kernels on torch tensors: on a GPU, or on the CPU through Triton's interpreter."""

from collections.abc import Mapping
from typing import Any

import torch

from capa_export.kernels.operator import Operator

__all__ = ["execute"]

_DTYPES = {"fp32": torch.float32, "int32": torch.int32, "int64": torch.int64}


def execute(operator: Operator, inputs: Mapping[str, torch.Tensor], **attributes: float) -> dict[str, torch.Tensor]:
    """The outputs by name.

    Args:
        operator: what to compute.
        inputs: by name, contiguous, with batch axis; on one GPU, or on the CPU where TRITON_INTERPRET=1 was set
            before the kernels were imported.
        attributes: of the node, all of them.

    Raises:
        ValueError: shapes contradict each other or the operator.
    """
    values = {name: int(inputs[name]) for name in operator.value_inputs}
    size = operator.sizes({name: inputs[name].shape for name in operator.inputs}, values)
    device = next(tensor.device for name, tensor in inputs.items() if name not in values)
    real = [inputs[name].dtype for name, tensor in operator.inputs.items() if tensor.dtype == "real"]
    dtypes = {**_DTYPES, "real": real[0] if real else None}

    def poisoned(dtype: str, *shape: int) -> torch.Tensor:
        # Not empty(): what a kernel forgets to write, or reads before it is written, then shows.
        torch_dtype = dtypes[dtype]
        assert torch_dtype is not None
        fill = torch.nan if torch_dtype.is_floating_point else -(2**30)
        return torch.full(shape, fill, dtype=torch_dtype, device=device)

    buffers: dict[str, Any] = {**inputs, **attributes}
    for name, scratch in operator.scratch(size).items():
        buffers[name] = poisoned(scratch.dtype, int(scratch.count))  # pyright: ignore[reportArgumentType]  # No symbol.
    outputs = {
        name: poisoned(tensor.dtype, *(one if isinstance(one, int) else getattr(size, one) for one in tensor.shape))
        for name, tensor in operator.outputs.items()
    }
    buffers |= outputs
    for launch in operator.launches(size):
        args = [buffers[arg] if isinstance(arg, str) else arg for arg in launch.args]
        launch.kernel[launch.grid](*args, **launch.constants, num_warps=launch.warps)
    return outputs
