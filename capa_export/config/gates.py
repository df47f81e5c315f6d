"""Gates of the user's own, in place of the recipe's: `--gate FILE`."""

from pathlib import Path

from pydantic import Field, ValidationError

from capa_export.base.errors import CapaError, ExitCode
from capa_export.base.toml import Settings, first_problem, read_toml
from capa_export.config.recipe import Bound, Gate, Parity

__all__ = ["GateFile", "Limits", "with_gates"]


class Limits(Settings):
    """What a candidate may cost: the table `compare` of a gate file."""

    kl: float = Field(default=0.02, ge=0)
    """Mean KL(reference || candidate) of the next token, in nats.

    Of the tiny Qwen2.5-VL's bundles: FP32 for FP16 makes 5e-9, a ratio of 0.97 for 0.75 makes 7e-4, no linear FFN for
    eleven makes 4e-3; random pruning is 0.3 from dense.
    """
    accuracy_drop: float = Field(default=0.05, ge=0)
    """Share of the answers that may be lost, where so few are asked that losing them is not significant."""
    vision_slowdown: float | None = Field(default=None, gt=0)
    """Milliseconds of the candidate over those of the reference; not asked where it is not given, as those below."""
    prefill_slowdown: float | None = Field(default=None, gt=0)
    decode_slowdown: float | None = Field(default=None, gt=0)


class GateFile(Settings):
    """A table per precision, each with the bounds that are other than the recipe's, and one for `compare`."""

    fp32: dict[str, Bound | bool] = Field(default_factory=dict)
    fp16: dict[str, Bound | bool] = Field(default_factory=dict)
    bf16: dict[str, Bound | bool] = Field(default_factory=dict)
    compare: Limits = Limits()
    """What `capa-export compare` lets a candidate lose."""


def with_gates(parity: Parity, path: Path | None) -> Parity:
    """The recipe's gates with those of a file in their place.

    Raises:
        CapaError: the file is missing or malformed, or names a bound that there is not.
    """
    if path is None:
        return parity
    given = read_toml(path, GateFile)
    changed: dict[str, Gate] = {}
    for precision in ("fp32", "fp16", "bf16"):
        gate: Gate = getattr(parity, precision)
        try:
            changed[precision] = Gate.model_validate({**dict(gate), **getattr(given, precision)})
        except ValidationError as error:
            raise CapaError(f"{path}: {precision}: {first_problem(error, Gate)}", ExitCode.USAGE) from error
    return parity.model_copy(update=changed)
