"""What samples decided of weights that are to be rounded: factors of their inputs, and decoder layers that stay plain.

Activation-aware weight quantization (AWQ, arXiv 2306.00978): where inputs are large, weights are rounded in smaller
steps. Weights are multiplied with a factor for every input before they are rounded, and what computes that input is
divided by it: the weight of the norm before, or the outputs of the product before. The model computes what it did.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from capa_export.base.errors import CapaError, ExitCode
from capa_export.base.files import refuse_special
from capa_export.model.checkpoint import CHUNK_ELEMENTS, StoredTensor
from capa_export.model.quantized.weight import Array

__all__ = ["CHOICE", "PLACES", "QUANTIZE", "WeightChoice", "awaiting_choice", "layer_name", "scaled"]

QUANTIZE = "quantize"
"""Name of the stage of a bundle that decides."""
CHOICE = "quantization.safetensors"
"""Name of the file that it writes."""

PLACES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.up_proj": ("mlp.down_proj",),
    }
)
"""Module of a decoder layer that is divided by factors -> the modules that read all of its outputs, and nothing else.

The output projection is not among them: heads share values, and scores of tokens read the lengths of these.
"""
_SMALLEST = 2.0**-14
"""The smallest FP16 number with all of its bits."""


def layer_name(index: int, module: str) -> str:
    """The graph's name of a module of a decoder layer."""
    return f"model.layers.{index}.{module}"


@dataclass(frozen=True, kw_only=True)
class WeightChoice:
    """What was decided of the weights of all decoder layers."""

    factors: Mapping[str, Array] = field(default_factory=dict[str, Array])
    """Name of a module of `PLACES` -> what its outputs are divided by, [outputs] in FP32."""
    errors: tuple[float, ...] = ()
    """By decoder layer: mean over its products of |x W' - x W|^2 / |x W|^2, where W' is rounded."""
    plain: tuple[int, ...] = ()
    """Decoder layers whose weights are not rounded, ascending."""
    tried: tuple[tuple[int, float], ...] = ()
    """Numbers of plain layers that were tried, and the mean KL of the next token with them, in nats."""
    budget: float | None = None
    """Nats that they were to keep to; None where no layer was to stay plain."""

    def with_plain(self, plain: Sequence[int]) -> "WeightChoice":
        """The same with these layers plain."""
        return replace(self, plain=tuple(sorted(plain)))

    def digest(self) -> str:
        """SHA-256 of what decides the weights."""
        parts = [json.dumps(self.plain).encode()]
        parts += [name.encode() + self.factors[name].tobytes() for name in sorted(self.factors)]
        return hashlib.sha256(b"\0".join(parts)).hexdigest()

    def save(self, path: Path) -> None:
        """Write the factors as tensors, and all else as metadata of the same file.

        Raises:
            CapaError: the file cannot be written.
        """
        about = {"version": 1, "errors": self.errors, "plain": self.plain, "tried": self.tried, "budget": self.budget}
        try:
            save_file(dict(self.factors), path, metadata={"capa_quantization": json.dumps(about, sort_keys=True)})
        except SafetensorError as error:
            raise CapaError(f"{path}: cannot be written: {error}", ExitCode.EXPORT) from error
        path.chmod(0o644)

    @classmethod
    def load(cls, path: Path) -> "WeightChoice":
        """Read what `save` wrote.

        Raises:
            CapaError: the file is missing or damaged.
        """
        refuse_special(path)
        try:
            with safe_open(path, framework="np") as file:
                about = json.loads((file.metadata() or {})["capa_quantization"])
                factors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping.
                for name, values in factors.items():
                    if values.dtype != np.float32 or values.ndim != 1 or not (np.isfinite(values) & (values > 0)).all():
                        raise ValueError(f"factors of {name} are not positive FP32 numbers")
                plain = tuple(map(int, about["plain"]))
                if min(plain, default=0) < 0 or len(set(plain)) < len(plain):
                    raise ValueError("plain layers are no layers")
                return cls(
                    factors=factors,
                    errors=tuple(map(float, about["errors"])),
                    plain=plain,
                    tried=tuple((int(count), float(kl)) for count, kl in about["tried"]),
                    budget=None if about["budget"] is None else float(about["budget"]),
                )
        except FileNotFoundError as error:
            raise CapaError(f"{path}: no such file; `capa-export calibrate` writes one") from error
        except (SafetensorError, KeyError, TypeError, ValueError, OverflowError, RecursionError, OSError) as error:
            raise CapaError(f"{path}: says nothing of how weights are rounded ({error}); calibrate again") from error


class _MadeTensor(StoredTensor):
    """A tensor whose elements are made when it is read."""

    __slots__ = ()

    def chunks(self, size: int = CHUNK_ELEMENTS) -> Iterator[Array]:
        flat = self.mapped().reshape(-1)
        return (flat[start : start + size] for start in range(0, flat.size, size))


@dataclass(frozen=True, kw_only=True, slots=True)
class _FactoredTensor(_MadeTensor):
    """A plain weight in FP32, its outputs and its inputs multiplied with factors."""

    plain: StoredTensor
    outputs: Array | None = field(default=None, compare=False)
    inputs: Array | None = field(default=None, compare=False)
    digest: str
    """Of the choice that the factors are of."""

    @property
    def paths(self) -> tuple[Path, ...]:
        return self.plain.paths

    def mapped(self) -> Array:
        weight = self.plain.mapped().astype(np.float32)
        if self.outputs is not None:
            weight *= self.outputs.reshape(-1, *[1] * (weight.ndim - 1))
        if self.inputs is not None:
            weight *= self.inputs
        return weight


@dataclass(frozen=True, kw_only=True, slots=True)
class _NormTensor(_MadeTensor):
    """The weight of a norm in FP32, divided by factors."""

    values: Array = field(compare=False)
    digest: str

    def mapped(self) -> Array:
        return self.values.copy()


class _AwaitingTensor(_MadeTensor):
    """A weight of which samples have yet to decide what it is rounded to."""

    __slots__ = ()

    def mapped(self) -> Array:
        raise CapaError(
            f"{self.path}: what the weights are rounded to is decided by samples, which nobody has looked at; run "
            "`capa-export calibrate` with the same --quantize, or say --quantize int4/rtn"
        )


def awaiting_choice(tensors: Mapping[str, StoredTensor], names: Sequence[str]) -> Mapping[str, StoredTensor]:
    """The tensors of a checkpoint, of which those with these names can be planned with, and not read."""
    waiting = {name: _AwaitingTensor(**_place(tensors[name])) for name in names if name in tensors}
    return MappingProxyType({**tensors, **waiting})


def scaled(tensors: Mapping[str, StoredTensor], choice: WeightChoice) -> Mapping[str, StoredTensor]:
    """The tensors of a checkpoint with the factors of all layers that are to be rounded put into them.

    The weights of norms keep to numbers that FP16 and BF16 both have, so that graphs of any precision have the same;
    what that changes of a factor the weights behind the norm make up for.

    Args:
        tensors: by canonical name.
        choice: what samples decided.

    Raises:
        CapaError: factors do not fit the weights.
    """
    digest = choice.digest()
    outputs: dict[str, Array] = {}
    inputs: dict[str, Array] = {}
    changed: dict[str, StoredTensor] = {}
    plain = {layer_name(index, module) for index in choice.plain for module in PLACES}
    for name, chosen in choice.factors.items():
        if name in plain:
            continue
        factors, weight = chosen, tensors.get(f"{name}.weight")
        module = next((module for module in PLACES if name.endswith(f".{module}")), None)
        if weight is None or module is None:
            raise CapaError(f"{CHOICE}: has factors of {name:.80}, which this checkpoint lacks; calibrate this one")
        stem = name.removesuffix(module)
        if weight.shape[0] != len(factors):
            raise CapaError(
                f"{weight.path}: {weight.name} has {weight.shape[0]} outputs, their factors are {len(factors)}"
            )
        if len(weight.shape) == 1:
            values, factors = _divided(weight.mapped().astype(np.float32), factors)
            changed[f"{name}.weight"] = _NormTensor(**_in_fp32(weight), values=values, digest=digest)
        else:
            outputs[f"{name}.weight"] = 1 / factors
        if f"{name}.bias" in tensors:
            outputs[f"{name}.bias"] = 1 / factors
        inputs |= {f"{stem}{reader}.weight": factors for reader in PLACES[module]}
    for name in outputs.keys() | inputs.keys():
        about: dict[str, Any] = {**_in_fp32(tensors[name]), "plain": tensors[name], "digest": digest}
        changed[name] = _FactoredTensor(outputs=outputs.get(name), inputs=inputs.get(name), **about)
    return MappingProxyType({**tensors, **changed})


def _divided(weight: Array, factors: Array) -> tuple[Array, Array]:
    """A norm's weight divided by factors, in the eight bits of BF16 within the range of FP16, and by what it then was.

    Numbers that would leave that range stay as they are.
    """
    divided = (weight / factors).astype(ml_dtypes.bfloat16).astype(np.float32)
    usable = (np.abs(divided) >= _SMALLEST) & (np.abs(divided) < np.finfo(np.float16).max)
    return np.where(usable, divided, weight), np.divide(weight, divided, out=np.ones_like(weight), where=usable)


def _place(tensor: StoredTensor) -> dict[str, Any]:
    names = ("name", "path", "numpy_dtype", "shape", "offset", "nbytes")
    return {name: getattr(tensor, name) for name in names}


def _in_fp32(tensor: StoredTensor) -> dict[str, Any]:
    size = 4 * int(np.prod(tensor.shape))
    return {**_place(tensor), "numpy_dtype": np.dtype(np.float32), "nbytes": size}
