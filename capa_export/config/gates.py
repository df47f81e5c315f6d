"""Gates: what artefacts must meet, as `graphs/gates.toml`, a recipe or `--gate FILE` says it."""

from functools import cache
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from capa_export.base.errors import CapaError, ExitCode
from capa_export.base.precision import FORMATS
from capa_export.base.toml import Settings, first_problem, read_toml, shipped

__all__ = ["Bound", "Gate", "GateFile", "Limits", "Parity", "with_gates"]


class Bound(Settings):
    """A limit, and the measurement it rests on; a bare number is a limit alone."""

    limit: float = Field(allow_inf_nan=False)
    healthy: float | None = None
    """Worst figure of healthy exports in `benchmarks/results`, by `benchmarks/faults.py`."""

    @model_validator(mode="before")
    @classmethod
    def _bare(cls, given: Any) -> Any:
        return {"limit": given} if isinstance(given, int | float) and not isinstance(given, bool) else given


class Gate(Settings):
    """What one precision's artefacts must meet against the oracle: at every step, on the worst prompt."""

    relative_error: Bound | None = None
    """Largest |logit difference| over the largest |logit|."""
    cosine: Bound
    """Smallest cosine of the logits."""
    norm_ratio: Bound
    """Largest | |logits| / |reference's| - 1 |."""
    kl: Bound | None = None
    """Largest KL(reference || artefact) of the next token, in nats."""
    hidden_cosine: Bound
    """Smallest cosine of a hidden state that leaves a layer."""
    hidden_norm_ratio: Bound
    """Largest | |hidden state| / |reference's| - 1 |."""
    noise_ratio: Bound | None = None
    """Largest difference of logits, and of a layer's hidden states, in units of what the eager model itself shows in
    this precision."""
    typical_noise_ratio: Bound | None = None
    """The same of the logits, as the geometric mean over all steps: an error that is small, and everywhere."""
    own_noise_ratio: Bound | None = None
    """How many times the eager model's own figure in this precision may be reached where that is beyond a bound of
    relative error, cosine, norm ratio or KL; of cosine's distance from 1 and of KL, which grow with the square of an
    error, the square of it. A hidden state may also be off by as many times the median difference of its layer, however
    short it is. Absent, those bounds are absolute."""
    flip_distance: Bound
    """How far from the cut a token may lie that is kept on one side only: relative lead of its score."""
    flip_noise_ratio: Bound | None = None
    """The same, in units of the noise of the scores; the larger of the two counts."""
    same_tokens: bool = False
    """Whether every greedy token must be the same."""


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
    """A table of bounds per precision, and one for `compare`: `graphs/gates.toml`, or the file of `--gate`."""

    fp32: dict[str, Bound | bool] = Field(default_factory=dict)
    fp16: dict[str, Bound | bool] = Field(default_factory=dict)
    bf16: dict[str, Bound | bool] = Field(default_factory=dict)
    compare: Limits = Limits()
    """What `capa-export compare` lets a candidate lose."""


class Parity(Settings):
    """How the artefacts are validated; a precision without a gate of its own has that of `graphs/gates.toml`."""

    prompts: int = Field(default=32, ge=1)
    steps: int = Field(default=16, ge=2)
    """Tokens compared per prompt: what prefill says, and what decode says after each that it is fed."""
    accuracy_samples: int = Field(default=200, ge=0)
    """Questions with known answers on which dense, CAPA and random pruning are compared."""
    fp32: Gate = Field(default_factory=lambda: _shipped_gate("fp32"))
    fp16: Gate = Field(default_factory=lambda: _shipped_gate("fp16"))
    bf16: Gate = Field(default_factory=lambda: _shipped_gate("bf16"))


@cache
def _shipped_gates() -> GateFile:
    return read_toml(shipped("graphs") / "gates.toml", GateFile)


def _shipped_gate(precision: str) -> Gate:
    return Gate.model_validate(getattr(_shipped_gates(), precision))


def with_gates(parity: Parity, path: Path | None) -> Parity:
    """The recipe's gates with those of a file in their place.

    Where the file sets bounds of a precision, the eager model's own noise leaves no room beyond them unless the file
    says how much.

    Raises:
        CapaError: the file is missing or malformed, or names a bound that there is not.
    """
    if path is None:
        return parity
    given = read_toml(path, GateFile)
    changed: dict[str, Gate] = {}
    for precision in FORMATS:
        gate: Gate = getattr(parity, precision)
        try:
            asked = getattr(given, precision)
            room = {"own_noise_ratio": None} if asked else {}
            changed[precision] = Gate.model_validate({**dict(gate), **room, **asked})
        except ValidationError as error:
            raise CapaError(f"{path}: {precision}: {first_problem(error, Gate)}", ExitCode.USAGE) from error
    return parity.model_copy(update=changed)
