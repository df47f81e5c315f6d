"""Plain weights rounded as they are read: a group's largest number by magnitude becomes the type's largest."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

import ml_dtypes
import numpy as np

from capa_export.base.errors import CapaError
from capa_export.base.weight_types import PackedLayers
from capa_export.model.checkpoint import StoredTensor
from capa_export.model.quantized.choice import CHOICE, WeightChoice, awaiting_choice, scaled
from capa_export.model.quantized.packed import BlockForm
from capa_export.model.quantized.tensor import QuantizedTensor
from capa_export.model.quantized.weight import Array, QuantizedWeight

__all__ = ["RoundedTensor", "as_rounded", "nearest", "rounded", "rounded_alone", "tower_products"]

_LINEARS = re.compile(r"model\.layers\.(\d+)\.(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)\.weight")
"""Names of the weights of a decoder's layers."""
_TOWER = re.compile(r"(?:visual|vision_tower)\.(?:blocks|encoder\.layers?)\.(\d+)\..+\.weight")
"""Names of the weights of a vision tower's blocks, norms among them; what merges and projects is behind these."""
_NEAREST = "rounded to nearest"
_WHOLE = ("int4", "int8")
"""Types of whole numbers."""
_SMALLEST_FP8, _LARGEST_FP8 = 2.0**-9, 448.0
_SMALLEST_SCALE = 2.0**-14
"""The smallest FP16 number with all of its bits, for groups of zeros and of numbers near them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundedTensor(QuantizedTensor):
    """A plain weight rounded to a type of few bits."""

    plain: StoredTensor
    form: PackedLayers
    method: str
    graph_name: str

    @property
    def of_tower(self) -> bool:
        return _TOWER.fullmatch(self.graph_name) is not None

    @property
    def format_name(self) -> str:
        scales = f"groups of {self.form.group}" if self.form.group else "one scale an output"
        return f"{self.form.type.name}, {self.method}, {scales}"

    @property
    def paths(self) -> tuple[Path, ...]:
        return self.plain.paths

    def quantized(self) -> QuantizedWeight:
        values, scales, outer = _rounded(self.plain, self.form)
        return QuantizedWeight(
            kind=self.form.kind,
            read_values=lambda: values,
            scales=scales,
            group_size=self.form.group or self.plain.shape[1],
            outer_scale=outer,
        )

    def mapped(self) -> Array:
        # A pass through a model that does not fit into memory rounds every weight.
        return as_rounded(self.plain.mapped().astype(np.float32, copy=False), self.form)

    def block_form(self) -> BlockForm:
        return BlockForm(kind=self.form.kind, group=self.form.group)


# Numbers and scales are written one after the other.
@lru_cache(maxsize=1)
def _rounded(plain: StoredTensor, form: PackedLayers) -> tuple[Array, Array, float]:
    """What `nearest` gives of a weight."""
    return nearest(plain.mapped().astype(np.float32, copy=False), form)


def nearest(weight: Array, form: PackedLayers) -> tuple[Array, Array, float]:
    """The numbers [out, in] that are nearest to a weight, their scales [out, groups], and the scale of these.

    Args:
        weight: [out, in] in FP32, whose memory is used up.
        form: the type, and the inputs that share a scale.
    """
    grouped, scales, outer = _in_scales(weight, form)
    with np.errstate(invalid="ignore"):
        values = grouped.astype(np.int8 if form.kind == "int4" else form.type.array)
    return values.reshape(weight.shape), scales, outer


def as_rounded(weight: Array, form: PackedLayers) -> Array:
    """What the nearest numbers of a weight stand for, [out, in] in FP32, in the weight's own memory.

    Args:
        weight: [out, in] in FP32.
        form: the type, and the inputs that share a scale.
    """
    grouped, scales, outer = _in_scales(weight, form)
    with np.errstate(over="ignore", invalid="ignore"):
        if form.kind not in _WHOLE:
            grouped[:] = grouped.astype(form.type.array)
        grouped *= (scales.astype(np.float32) * np.float32(outer))[..., None]
    return weight


def _in_scales(weight: Array, form: PackedLayers) -> tuple[Array, Array, float]:
    """A weight's groups [out, groups, -] in units of their scales, in its own memory, the scales, and that of these.

    Numbers of whole types are rounded, others have yet to be.
    """
    grouped = weight.reshape(weight.shape[0], -1, form.group or weight.shape[1])
    largest = np.float32(form.type.largest)
    # What is not finite shows in the scales, or in FP8 numbers, which are searched for it when they are written.
    with np.errstate(over="ignore", invalid="ignore"):
        scales, outer = _scales(np.abs(grouped).max(-1) / largest, form)
        grouped /= (scales.astype(np.float32) * np.float32(outer))[..., None]
        np.clip(grouped, -largest, largest, out=grouped)
        if form.kind in _WHOLE:
            np.rint(grouped, out=grouped)
    return grouped, scales, outer


def _scales(wanted: Array, form: PackedLayers) -> tuple[Array, float]:
    """The scales nearest to those wanted, and the scale of these.

    They have the eight bits of BF16 within the range of FP16, so that graphs of any precision have the same weights.
    Those of NVFP4 are FP8, under a power of two that brings the largest into the range.
    """
    if form.kind != "nvfp4":
        scales = wanted.astype(ml_dtypes.bfloat16).astype(np.float16).astype(np.float32)
        return np.maximum(scales, np.float32(_SMALLEST_SCALE)), 1.0
    most = float(wanted.max()) / _LARGEST_FP8
    outer = 2.0 ** math.ceil(math.log2(most)) if math.isfinite(most) and most > 0 else most or 1.0
    return np.clip(wanted / np.float32(outer), _SMALLEST_FP8, _LARGEST_FP8).astype(ml_dtypes.float8_e4m3fn), outer


def rounded(
    tensors: Mapping[str, StoredTensor], form: PackedLayers, choice: WeightChoice | None = None, *, waits: bool = False
) -> Mapping[str, StoredTensor]:
    """The tensors of a checkpoint with the weights of its decoder's layers rounded, unless they have the type already.

    Args:
        tensors: by canonical name.
        form: the type, and the inputs that share a scale; they divide those of every layer.
        choice: what samples decided of the weights.
        waits: whether samples have yet to decide, so that no weight can be read.

    Raises:
        CapaError: a layer's weight is quantized already, to another type, or the choice is of other weights.
    """
    chosen = {name: match for name in tensors if (match := _LINEARS.fullmatch(name))}
    for name in chosen:
        if isinstance(tensor := tensors[name], QuantizedTensor):
            if not form.type.stays and tensor.quantized().kind == form.kind:
                return tensors
            raise _quantized_already(tensor, "--quantize")
    method = "scaled by activations" if waits or (choice is not None and choice.factors) else _NEAREST
    plain = () if choice is None else choice.plain
    if unknown := set(plain) - {int(match[1]) for match in chosen.values()}:
        raise CapaError(f"{CHOICE}: leaves layer {min(unknown)} plain, which this checkpoint lacks; calibrate this one")
    if waits:
        tensors = awaiting_choice(tensors, list(chosen))
    elif choice is not None:
        tensors = scaled(tensors, choice)
    weights = {
        name: _of(name, tensors[name], form, method) for name, match in chosen.items() if int(match[1]) not in plain
    }
    return MappingProxyType({**tensors, **weights})


def rounded_alone(
    tensors: Mapping[str, StoredTensor], names: Iterable[str], form: PackedLayers, *, option: str
) -> Mapping[str, StoredTensor]:
    """The tensors of a checkpoint with these rounded to nearest, whatever becomes of the others.

    One that stands for several names, as a tied head does, is rounded where it has one of these.

    Args:
        tensors: by canonical name.
        names: of weights; those that are not there are passed over.
        form: the type, and the inputs that share a scale; they divide those of every weight.
        option: that asks for it.

    Raises:
        CapaError: one of them is quantized already.
    """
    weights: dict[str, RoundedTensor] = {}
    for name in names:
        if (plain := tensors.get(name)) is not None:
            if isinstance(plain, QuantizedTensor):
                raise _quantized_already(plain, option)
            weights[name] = _of(name, plain, form, _NEAREST)
    return MappingProxyType({**tensors, **weights})


def tower_products(tensors: Mapping[str, StoredTensor], num_blocks: int) -> Iterator[str]:
    """The names of the weights that so many of the first blocks of a vision tower multiply with."""
    for name, tensor in tensors.items():
        match = _TOWER.fullmatch(name)
        if match is not None and int(match[1]) < num_blocks and len(tensor.shape) == 2:
            yield name


def _quantized_already(tensor: QuantizedTensor, option: str) -> CapaError:
    return CapaError(
        f"{tensor.path}: the checkpoint is quantized already ({tensor.format_name}); leave {option} away, "
        "or take the checkpoint it was made from"
    )


def _of(name: str, plain: StoredTensor, form: PackedLayers, method: str) -> RoundedTensor:
    return RoundedTensor(
        name=plain.name,
        path=plain.path,
        numpy_dtype=np.dtype(np.float32),
        shape=plain.shape,
        offset=plain.offset,
        nbytes=4 * plain.shape[0] * plain.shape[1],
        plain=plain,
        form=form,
        method=method,
        graph_name=name,
    )
