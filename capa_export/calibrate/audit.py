"""Finds the parts of a model whose calibrated activations FP16 cannot hold, before anything is built."""

from collections.abc import Mapping
from typing import Any

from capa_export.base.dims import ModelDims
from capa_export.base.errors import CapaError
from capa_export.base.precision import FP16_MAX
from capa_export.config.parts import Unit, address_of, branch_of, measured_unit

__all__ = ["audit"]

_MANY = 40
"""Samples from which on a calibration has seen most of what there is to see."""
_REACH, _REACH_OF_FEW = 2.0, 4.0
"""How many times further other pictures may reach than those of a calibration of many samples, or of few.

Of all values that `benchmarks/ranges.py` watches, 280 to 593 of a model, the worst was 1.84 where 40 samples were seen,
2.12 where 32, 3.70 where 8 and 4.29 where 4. Those that come near FP16's end vary least: of each model's 20 largest
the worst was 1.10, and the massive activations of a pretrained decoder were the same on every picture.
"""


def audit(
    absmax: Mapping[str, float], precision: str, dims: ModelDims[Any], samples: int
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The parts to compute in FP32, as `--fp32-layers` names them, and a sentence for each.

    Args:
        absmax: the calibration's largest magnitudes, by module path.
        precision: the build's precision; only FP16 has a range to be held against.
        dims: the model's dimensions.
        samples: number of samples that the calibration saw.

    Raises:
        CapaError: no part that could be computed in FP32 would hold one of the values.
    """
    if precision != "fp16":
        return (), ()
    limit = FP16_MAX / (_REACH if samples >= _MANY else _REACH_OF_FEW)
    worst: dict[Unit, tuple[float, str]] = {}
    for name, largest in absmax.items():
        if not largest <= limit and (unit := _unit(name, largest, dims)) is not None:
            worst[unit] = max(worst.get(unit, (0.0, "")), (largest, name))
    findings = [f"{unit} in FP32: {name} reaches {_share(largest)}" for unit, (largest, name) in worst.items()]
    if not any(name.endswith(".scores") for name in absmax):
        findings.append(
            "the calibration knows no norms, FFN products or attention scores; calibrate again to audit them"
        )
    return tuple(sorted(map(str, worst))), tuple(sorted(findings))


def _unit(name: str, largest: float, dims: ModelDims[Any]) -> Unit | None:
    """The part to compute in FP32 for a value of this size; None where the graph does not compute the value."""
    unit, address = measured_unit(name), address_of(name)
    if unit is None or address is None:
        if name.endswith(".input"):
            # What comes before it is watched as well.
            return None
        raise _refusal(name, largest, "what stands behind the last layer is not among the parts that can be in FP32")
    if address.index >= (dims.vision.num_blocks if unit.tower else dims.decoder.num_layers):
        return None
    if unit.index is None and address.index == 0 and branch_of(address.path) == "attention":
        entering = "patches are embedded in it" if unit.tower else "the embeddings, of text and of pictures, are in it"
        raise _refusal(name, largest, entering)
    if not unit.tower and address.path.endswith((".key", ".value")):
        raise _refusal(name, largest, "the KV cache is in it")
    return unit


def _share(largest: float) -> str:
    return f"{largest:.3g}, {largest / FP16_MAX:.0%} of the largest FP16 number"


def _refusal(name: str, largest: float, why: str) -> CapaError:
    return CapaError(f"{name} reaches {_share(largest)}, and {why}; build with --precision bf16")
