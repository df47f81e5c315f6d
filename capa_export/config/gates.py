"""Gates of the user's own, in place of the recipe's: `--gate FILE`."""

from pathlib import Path

from pydantic import Field, ValidationError

from capa_export.base.errors import CapaError, ExitCode
from capa_export.base.toml import Settings, first_problem, read_toml
from capa_export.config.recipe import Bound, Gate, Parity
from capa_export.study.compare.schema import Limits

__all__ = ["GateFile", "with_gates"]


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
