"""The parts of a model, as options, its modules and the nodes of its graphs name them."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from capa_export.base.dims import ModelDims
from capa_export.base.errors import CapaError, ExitCode

__all__ = [
    "ATTENTION",
    "Address",
    "Branch",
    "Unit",
    "address_of",
    "block_of",
    "branch_of",
    "check_units",
    "in_tower",
    "layer_of",
    "measured_unit",
    "parse_unit",
]

ATTENTION = ("self_attn", "attn", "attention")
"""What the modules of layers call their attention."""
_FIRST_NORMS = ("input_layernorm", "norm1", "layer_norm1", "layernorm_before")
"""What they call the norm before it."""
_ROOTS = {"model", "visual", "vision_tower"}
_ADDRESS = re.compile(r"(?P<scope>(?:.*?[./])?)(?P<layer>(?:blocks|layers?)\.(?P<index>\d+))(?:[./](?P<path>.+))?")
_WORD = re.compile(
    r"(?:(?P<layer>\d+)(?:\.(?P<branch>self_attn|mlp))?|(?P<tower>visual)\.(?:(?P<block>\d+)(?:\.(?P<part>attn|mlp))?"
    r"|residual)|residual)"
)
Branch = Literal["attention", "mlp"]
_WORDS: dict[Branch, str] = {"attention": "self_attn", "mlp": "mlp"}


@dataclass(frozen=True, slots=True)
class Unit:
    """A part of the model that can be computed in FP32."""

    tower: bool
    """Whether it is the vision tower's, and not the decoder's."""
    index: int | None = None
    """Of the layer; None for the residual stream, from the first layer to whatever reads it behind the last."""
    branch: Branch | None = None
    """Attention or FFN, each with the norm before it; None for the whole layer."""

    def covers(self, other: "Unit") -> bool:
        """Whether all of the other unit is in this one."""
        return (self.tower, self.index) == (other.tower, other.index) and self.branch in (None, other.branch)

    def __str__(self) -> str:
        """As `parse_unit` reads it."""
        branch = "attn" if self.branch == "attention" and self.tower else self.branch and _WORDS[self.branch]
        words = ["visual" if self.tower else None, "residual" if self.index is None else str(self.index), branch]
        return ".".join(word for word in words if word is not None)


def parse_unit(word: str) -> Unit:
    """The unit that `--fp32-layers` calls so.

    Raises:
        CapaError: it calls none so.
    """
    found = _WORD.fullmatch(word)
    if found is None:
        raise CapaError(
            f"--fp32-layers {word}: no such part of a model; its parts are N, N.self_attn, N.mlp and residual, and "
            "of its vision tower visual.N, visual.N.attn, visual.N.mlp and visual.residual",
            ExitCode.USAGE,
        )
    index, branch = (found["layer"] or found["block"]), (found["branch"] or found["part"])
    return Unit(
        word.startswith("visual."),
        None if index is None else int(index),
        None if branch is None else "mlp" if branch == "mlp" else "attention",
    )


def check_units(words: Iterable[str], dims: ModelDims[Any]) -> None:
    """Refuse parts that a model does not have, before anything is run.

    Raises:
        CapaError: it has no such layer, or no model has such a part.
    """
    for word in words:
        unit = parse_unit(word)
        count = dims.vision.num_blocks if unit.tower else dims.decoder.num_layers
        if unit.index is not None and unit.index >= count:
            what = "vision tower" if unit.tower else "decoder"
            raise CapaError(f"--fp32-layers {word}: this model's {what} has layers 0 to {count - 1}", ExitCode.USAGE)


@dataclass(frozen=True, slots=True)
class Address:
    """Where a module, or a node of a graph, stands in the layers of a model."""

    layer: str
    """`layers.3`, or `visual.blocks.2` for a node of the tower."""
    index: int
    """Of the layer."""
    path: str
    """Its name in the layer; empty for the layer itself."""


def address_of(name: str) -> Address | None:
    """The address of `model.language_model.layers.3.mlp` or `model/layers.3/mlp/Mul`; None outside layers."""
    found = _ADDRESS.fullmatch(name)
    if found is None:
        return None
    layer = f"{found['scope']}{found['layer']}".replace("/", ".").removeprefix("model.")
    return Address(layer, int(found["index"]), found["path"] or "")


def layer_of(node: str) -> str:
    """`layers.3` of `model/layers.3/self_attn/Mul`, `visual.blocks.2` of a node of the tower; empty outside layers."""
    address = address_of(node)
    return "" if address is None else address.layer


def block_of(node: str) -> str:
    """`self_attn` of `model/layers.3/self_attn/Mul`; what stands in a layer itself is `residual` or `visual_scale`."""
    address = address_of(node)
    if address is None:
        parts = node.split("/")
        inner = parts[parts[0] in _ROOTS : -1]
        return inner[0] if inner else ""
    first, below, _ = address.path.partition("/")
    if below:
        return first
    return "visual_scale" if first.startswith("VisualScale") else "residual"


def branch_of(path: str) -> Branch | None:
    """The branch of a module, by its path in the layer; None for the layer itself."""
    part = path.partition(".")[0]
    if part in ATTENTION or part in _FIRST_NORMS:
        return "attention"
    return "mlp" if part == "mlp" or "norm" in part else None


def in_tower(module: str) -> bool:
    """Whether a module belongs to the vision tower and not to the decoder, by its name in the model."""
    return "language_model" not in module


def measured_unit(name: str) -> Unit | None:
    """The unit that computes a value, as a calibration names it; None outside layers.

    What leaves a layer or enters a norm is the residual stream.
    """
    address = address_of(name)
    if address is None:
        return None
    part, _, what = address.path.partition(".")
    if not part or ("norm" in part and what):
        return Unit(in_tower(name))
    return Unit(in_tower(name), address.index, branch_of(part))
