"""Plain weights rounded to INT4 as they are read: each group's largest number by magnitude becomes 7 or -7."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

import ml_dtypes
import numpy as np

from capa_export.base.errors import CapaError
from capa_export.model.checkpoint import StoredTensor
from capa_export.model.quantized.choice import WeightChoice, awaiting_choice, scaled
from capa_export.model.quantized.packed import BlockForm
from capa_export.model.quantized.tensor import QuantizedTensor
from capa_export.model.quantized.weight import Array, QuantizedWeight

__all__ = ["RoundedTensor", "nearest", "rounded"]

_LINEARS = re.compile(r"model\.layers\.(\d+)\.(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)\.weight")
"""Names of the weights of a decoder's layers; vision tower, embedding and LM head stay as they are."""
_LARGEST = 7
_SMALLEST_SCALE = 2.0**-14
"""The smallest FP16 number with all of its bits, for groups of zeros and of numbers near them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundedTensor(QuantizedTensor):
    """A plain weight rounded to INT4."""

    plain: StoredTensor
    group: int
    method: str = "rounded to nearest"

    @property
    def format_name(self) -> str:
        return f"INT4, {self.method}, groups of {self.group}"

    @property
    def paths(self) -> tuple[Path, ...]:
        return self.plain.paths

    def quantized(self) -> QuantizedWeight:
        values, scales = _rounded(self.plain, self.group)
        return QuantizedWeight(kind="int4", read_values=lambda: values, scales=scales, group_size=self.group)

    def block_form(self) -> BlockForm:
        return BlockForm(group=self.group)


# Numbers and scales are written one after the other.
@lru_cache(maxsize=1)
def _rounded(plain: StoredTensor, group: int) -> tuple[Array, Array]:
    """The whole numbers [out, in] and the scales [out, groups] of a weight."""
    return nearest(plain.mapped().astype(np.float32), group)


def nearest(weight: Array, group: int) -> tuple[Array, Array]:
    """The whole numbers [out, in] that are nearest to a weight, and their scales [out, groups].

    Scales have the eight bits of BF16 within the range of FP16, so that graphs of any precision have the same weights.

    Args:
        weight: [out, in] in FP32, whose memory is used up.
        group: inputs that share a scale.
    """
    grouped = weight.reshape(weight.shape[0], -1, group)
    scales = np.abs(grouped).max(-1) / np.float32(_LARGEST)
    # What is not finite shows in the scales, which are searched for it when they are written.
    with np.errstate(over="ignore", invalid="ignore"):
        scales = scales.astype(ml_dtypes.bfloat16).astype(np.float16).astype(np.float32)
        scales = np.maximum(scales, np.float32(_SMALLEST_SCALE))
        grouped /= scales[..., None]
        np.rint(grouped, out=grouped)
        np.clip(grouped, -_LARGEST, _LARGEST, out=grouped)
        return grouped.astype(np.int8).reshape(weight.shape), scales


def rounded(
    tensors: Mapping[str, StoredTensor], group: int, choice: WeightChoice | None = None, *, waits: bool = False
) -> Mapping[str, StoredTensor]:
    """The tensors of a checkpoint with the weights of its decoder's layers rounded.

    Args:
        tensors: by canonical name.
        group: inputs that share a scale; divides those of every layer.
        choice: what samples decided of the weights.
        waits: whether samples have yet to decide, so that no weight can be read.

    Raises:
        CapaError: a layer's weight is quantized already, or the choice is of other weights.
    """
    chosen = {name: match for name in tensors if (match := _LINEARS.fullmatch(name))}
    for name in chosen:
        if isinstance(tensor := tensors[name], QuantizedTensor):
            raise CapaError(
                f"{tensor.path}: the checkpoint is quantized already ({tensor.format_name}); leave --quantize away, "
                "or take the checkpoint it was made from"
            )
    method = "scaled by activations" if waits or (choice is not None and choice.factors) else "rounded to nearest"
    plain = () if choice is None else choice.plain
    if waits:
        tensors = awaiting_choice(tensors, list(chosen))
    elif choice is not None:
        tensors = scaled(tensors, choice)
    weights = {name: _of(tensors[name], group, method) for name, match in chosen.items() if int(match[1]) not in plain}
    return MappingProxyType({**tensors, **weights})


def _of(plain: StoredTensor, group: int, method: str) -> RoundedTensor:
    return RoundedTensor(
        name=plain.name,
        path=plain.path,
        numpy_dtype=np.dtype(np.float32),
        shape=plain.shape,
        offset=plain.offset,
        nbytes=4 * plain.shape[0] * plain.shape[1],
        plain=plain,
        group=group,
        method=method,
    )
