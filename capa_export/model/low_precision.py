"""The eager model in half precision, with parts of it in FP32: what the precision alone does to it.

Shares the names of parts with the graphs, and no code that puts them in FP32.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor, nn

from capa_export.base.precision import FORMATS
from capa_export.config.parts import Branch, Unit, address_of, branch_of, in_tower, parse_unit

__all__ = ["HALF", "lowered"]

HALF: dict[str, torch.dtype] = {name: getattr(torch, FORMATS[name].array) for name in ("fp16", "bf16")}

_FEW_ROWS = 8


def lowered(model: Any, dtype: torch.dtype, fp32_layers: Sequence[str] = ()) -> Any:
    """A copy with weights in `dtype`; buffers, the rotary frequencies, stay in FP32 as they do when it is loaded so.

    Args:
        model: in FP32.
        dtype: half precision.
        fp32_layers: parts whose weights stay in FP32, and that compute in it.
    """
    copy = deepcopy(model)
    for module in copy.modules():
        if type(module) in _ROUNDED:
            module.__class__ = _ROUNDED[type(module)]
    units = [parse_unit(word) for word in fp32_layers]
    wide: list[nn.Module] = []
    for tower in (False, True):
        if mine := [unit for unit in units if unit.tower == tower]:
            wide += _put_in_fp32(copy, mine, dtype, tower=tower)
    kept = {parameter for module in wide for parameter in module.parameters()}
    for parameter in copy.parameters():
        if parameter not in kept:
            parameter.data = parameter.data.to(dtype)
    return copy


class _RoundedLinear(nn.Linear):
    """A product that is summed in FP32 and rounded once, whatever the processor's own kernels do.

    That is what they do where they are good, and several times faster than where they are not. A few rows are not worth
    an FP32 copy of the weights.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - its name in torch.
        if self.weight.dtype == torch.float32 or input.numel() < _FEW_ROWS * self.in_features:
            return super().forward(input)
        # torch types it as if there always were one.
        bias = cast("Tensor | None", self.bias)
        bias = None if bias is None else bias.float()
        return nn.functional.linear(input.float(), self.weight.float(), bias).to(self.weight.dtype)


class _RoundedPatches(nn.Module):
    """A convolution that is summed in FP32 and rounded once, as `_RoundedLinear` is."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002 - as above.
        conv = super()._conv_forward  # pyright: ignore[reportAttributeAccessIssue]  # Of the convolution it is mixed into.
        if weight.dtype == torch.float32:
            return conv(input, weight, bias)
        return conv(input.float(), weight.float(), None if bias is None else bias.float()).to(weight.dtype)


class _RoundedConv2d(_RoundedPatches, nn.Conv2d):
    pass


class _RoundedConv3d(_RoundedPatches, nn.Conv3d):
    pass


_ROUNDED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: _RoundedLinear,
    nn.Conv2d: _RoundedConv2d,
    nn.Conv3d: _RoundedConv3d,
}


def _put_in_fp32(model: Any, units: Sequence[Unit], dtype: torch.dtype, *, tower: bool) -> Iterator[nn.Module]:
    """The modules of the decoder, or of the tower, that are to keep their weights; hooks cast between them and others.

    What is added to a stream in FP32 is added in FP32, so that a block's output is cast and its branches' need not be.
    The decoder's layers are run by hand, and cast there.
    """
    residual = any(unit.index is None for unit in units)
    blocks: list[nn.Module] = []
    for name, module in model.named_modules():
        if name.startswith("lm_head") or in_tower(name) != tower:
            continue
        address = address_of(name)
        if address is not None and not address.path:
            branches = _branches(module)
            of_block = [unit for unit in units if unit.index == len(blocks)]
            for branch, parts in branches.items():
                if any(unit.branch in (None, branch) for unit in of_block):
                    yield from parts
                elif residual:
                    yield parts[0]
                for part in parts:
                    part.register_forward_pre_hook(_take, with_kwargs=True)
            if any(unit.branch is None for unit in of_block):
                yield module
            if tower:
                stream = torch.float32 if residual else dtype
                module.register_forward_pre_hook(_entering(stream))
                module.register_forward_hook(_leaving(stream))
            blocks.append(module)
        elif residual and blocks and address is None and dict(module.named_parameters(recurse=False)):
            # Behind the blocks: whatever is given the stream computes in FP32, and what comes after it does not.
            yield module
            module.register_forward_pre_hook(_follow)
            module.register_forward_hook(_leaving(dtype))
    if residual and not tower:
        model.get_input_embeddings().register_forward_hook(_leaving(torch.float32))


def _branches(block: nn.Module) -> dict[Branch, list[nn.Module]]:
    """Attention and FFN, each with the norm before it in front."""
    branches: dict[Branch, list[nn.Module]] = {"attention": [], "mlp": []}
    for name, child in sorted(block.named_children(), key=lambda named: "norm" not in named[0]):
        if branch := branch_of(name):
            branches[branch].append(child)
    return branches


def _take(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
    """A module's inputs in the dtype of its weights."""
    to = next(module.parameters()).dtype
    return _cast(given, to), {name: _cast(value, to) for name, value in named.items()}


def _follow(module: nn.Module, given: tuple[Tensor, ...]) -> None:
    """Put a module in the dtype of its input, which is the same at every call."""
    module.to(given[0].dtype)


def _entering(dtype: torch.dtype) -> Callable[..., Any]:
    def hook(_module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_cast(given[0], dtype), *given[1:])

    return hook


def _leaving(dtype: torch.dtype) -> Callable[..., Any]:
    def hook(_module: nn.Module, _given: Any, output: Any) -> Any:
        return _cast(output, dtype)

    return hook


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, tuple):
        return tuple(_cast(entry, dtype) for entry in value)
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
