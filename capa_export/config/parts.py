"""The parts of a model, as options name them and as nodes of its graphs are named."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from capa_export.base.dims import ModelDims
from capa_export.base.errors import CapaError, ExitCode

__all__ = ["LAYER", "Branch", "Unit", "check_units", "layer_of", "parse_unit"]

LAYER = re.compile(r"(?:blocks|layers?)\.\d+")
"""The part of a node's name that says which layer or block it stands in."""
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


def layer_of(node: str) -> str:
    """`layers.3` of `model/layers.3/self_attn/Mul`, `visual.blocks.2` of a node of the tower; empty outside layers."""
    parts = node.split("/")
    depth = next((depth for depth, part in enumerate(parts) if LAYER.fullmatch(part)), None)
    return "" if depth is None else ".".join(parts[: depth + 1]).removeprefix("model.")
