"""The parts that were trained, as they lie in a safetensors file beside this module.

`tower.*` and `proj.*` are the vision tower and the projector whole, `lora.LAYER.self_attn.PROJECTION.{a,b}` a change
of low rank of a projection in the decoder's attention. The decoder's FFNs, norms and embeddings were not trained.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["CLUTTER", "Change", "TrainedParts", "load_parts", "merged", "save_parts"]

CLUTTER = Path(__file__).with_name("clutter.safetensors")


@dataclass(frozen=True, slots=True)
class Change:
    """A change of low rank R of a weight [out, in]: the product of `b` [out, R] and `a` [R, in]."""

    a: Tensor
    b: Tensor


@dataclass(frozen=True, kw_only=True)
class TrainedParts:
    """All that was trained, FP32."""

    tower: Mapping[str, Tensor]
    """Weights of the vision tower by name."""
    projector: Mapping[str, Tensor]
    """Weights of the projector by name."""
    changes: Mapping[str, Change]
    """By the name of the decoder's projection, as `layers.0.self_attn.q_proj`."""


def merged(weight: Tensor, change: Change) -> Tensor:
    """A weight with its change added."""
    return weight + change.b @ change.a


def save_parts(path: Path, parts: TrainedParts) -> None:
    """Write the parts as FP16."""
    tensors = {f"tower.{name}": tensor for name, tensor in parts.tower.items()}
    tensors |= {f"proj.{name}": tensor for name, tensor in parts.projector.items()}
    for name, change in parts.changes.items():
        stem = f"lora.{name.removeprefix('layers.')}"
        tensors |= {f"{stem}.a": change.a, f"{stem}.b": change.b}
    save_file({name: tensor.detach().half().contiguous() for name, tensor in tensors.items()}, path)


def load_parts(path: Path) -> TrainedParts:
    """Read what `save_parts` wrote."""
    tensors = {name: tensor.float() for name, tensor in load_file(path).items()}

    def of(part: str) -> dict[str, Tensor]:
        return {name.removeprefix(part): tensor for name, tensor in tensors.items() if name.startswith(part)}

    factors = of("lora.")
    stems = dict.fromkeys(name.rpartition(".")[0] for name in factors)
    return TrainedParts(
        tower=of("tower."),
        projector=of("proj."),
        changes={f"layers.{stem}": Change(factors[f"{stem}.a"], factors[f"{stem}.b"]) for stem in stems},
    )
