"""Finds the parts of a model whose calibrated activations FP16 cannot hold, before anything is built."""

import re
from collections.abc import Mapping
from typing import Any

from capa_export.base.dims import ModelDims
from capa_export.base.errors import CapaError
from capa_export.calibrate.sums import FP16_MAX
from capa_export.config.parts import Unit

__all__ = ["audit"]

_LIMIT = FP16_MAX / 4
"""A quarter of FP16's largest number: other pictures reach further than those of the calibration."""

_BLOCK = re.compile(r".*\.(?:layers?|blocks)\.(?P<index>\d+)(?:\.(?P<path>.+))?")
_FIRST_NORMS = ("input_layernorm", "norm1", "layer_norm1", "layernorm_before")


def audit(absmax: Mapping[str, float], precision: str, dims: ModelDims[Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The parts to compute in FP32, as `--fp32-layers` names them, and a sentence for each.

    Args:
        absmax: the calibration's largest magnitudes, by module path.
        precision: the build's precision; only FP16 has a range to be held against.
        dims: the model's dimensions.

    Raises:
        CapaError: no part that could be computed in FP32 would hold one of the values.
    """
    if precision != "fp16":
        return (), ()
    worst: dict[Unit, tuple[float, str]] = {}
    for name, largest in absmax.items():
        if not largest <= _LIMIT and (unit := _unit(name, largest, dims)) is not None:
            worst[unit] = max(worst.get(unit, (0.0, "")), (largest, name))
    findings = [f"{unit} in FP32: {name} reaches {_share(largest)}" for unit, (largest, name) in worst.items()]
    if not any(name.endswith(".scores") for name in absmax):
        findings.append(
            "the calibration knows no norms, FFN products or attention scores; calibrate again to audit them"
        )
    return tuple(sorted(map(str, worst))), tuple(sorted(findings))


def _unit(name: str, largest: float, dims: ModelDims[Any]) -> Unit | None:
    """The part to compute in FP32 for a value of this size; None where the graph does not compute the value."""
    tower = "language_model" not in name
    found = _BLOCK.fullmatch(name)
    if found is None:
        if name.endswith(".input"):
            # What comes before it is watched as well.
            return None
        raise _refusal(name, largest, "what stands behind the last layer is not among the parts that can be in FP32")
    index, path = int(found["index"]), found["path"] or ""
    part, _, what = path.partition(".")
    if index >= (dims.vision.num_blocks if tower else dims.decoder.num_layers):
        return None
    if "norm" in part:
        first = part in _FIRST_NORMS
        if not what:
            return Unit(tower, index, "attention" if first else "mlp")
        if first and index == 0:
            entering = "patches are embedded in it" if tower else "the embeddings, of text and of pictures, are in it"
            raise _refusal(name, largest, entering)
        return Unit(tower)
    if not part:
        return Unit(tower)
    if what in ("key", "value") and not tower:
        raise _refusal(name, largest, "the KV cache is in it")
    return Unit(tower, index, "mlp" if part == "mlp" else "attention")


def _share(largest: float) -> str:
    return f"{largest:.3g}, {largest / FP16_MAX:.0%} of the largest FP16 number"


def _refusal(name: str, largest: float, why: str) -> CapaError:
    return CapaError(f"{name} reaches {_share(largest)}, and {why}; build with --precision bf16")
