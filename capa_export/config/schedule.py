"""What is compared with what: selectors at layers with ratios, and what becomes of visual FFNs, in one word each."""

import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pydantic import ValidationError

from capa_export.base.errors import CapaError, ExitCode
from capa_export.base.toml import first_problem
from capa_export.config.recipe import FFN, Prune, Stage

__all__ = ["FFNs", "Method", "parse_method", "stage_text"]

FFNs = Literal["scale", "full", "skip", "per-image"]
"""Of visual tokens in linear layers: a scale in their place, as they are, left out, or a scale where the layer is
linear for this very prompt."""

_STAGE = re.compile(
    r"(?P<selector>[a-z][a-z0-9-]*)(?:@(?P<layer>\d+))?:(?P<ratio>[0-9.eE+-]+)(?:\{(?P<options>[^{}]*)\})?"
)
_GRAMMAR = "write selector@layer:ratio, as capa@2:0.75 or divprune:0.9/full, stages joined with +"


@dataclass(frozen=True)
class Method:
    """What is done to the dense model."""

    name: str
    """As it was written."""
    stages: tuple[Stage, ...] = ()
    ffn: FFNs = "full"
    eta: float | None = None
    """Cosine above which a layer is linear; None for the recipe's."""

    def prune(self, min_keep_per_image: int) -> Prune | None:
        """None where nothing is dropped."""
        if not self.stages:
            return None
        return Prune(schedule=self.stages, min_keep_per_image=min_keep_per_image)

    def ffn_settings(self, ffn: FFN) -> FFN:
        """The recipe's, with this method's eta."""
        return ffn if self.eta is None else ffn.model_copy(update={"eta": self.eta})


def parse_method(text: str) -> Method:
    """`dense`, or `STAGE[+STAGE...][/FFN]`.

    A stage is `selector[@layer]:ratio[{option=value,...}]`; layers belong to selectors inside the decoder. FFN is one
    of `FFNs` or `eta=NUMBER`, which is `scale` with another eta; `scale` where nothing is said. `dense/scale` and its
    like drop no tokens.

    Raises:
        CapaError: it reads otherwise, or names what there is not.
    """
    stages, _, ffn = text.strip().partition("/")
    eta = None
    if ffn.startswith("eta="):
        eta, ffn = _number(text, "eta", ffn.removeprefix("eta=")), "scale"
        if not 0 < eta < 1:
            raise CapaError(f"method {text!r}: eta must be between 0 and 1", ExitCode.USAGE)
    elif ffn and ffn not in get_args(FFNs):
        raise CapaError(
            f"method {text!r}: unknown {ffn!r}; known: {', '.join(get_args(FFNs))}, eta=NUMBER", ExitCode.USAGE
        )
    if stages == "dense":
        return Method(text, (), ffn or "full", eta)  # pyright: ignore[reportArgumentType]  # It is one of FFNs.
    found = tuple(_stage(text, part) for part in re.split(r"\+(?=[a-z])", stages))
    method = Method(text, found, ffn or "scale", eta)  # pyright: ignore[reportArgumentType]  # As above.
    try:
        method.prune(0)
    except ValidationError as error:
        raise CapaError(f"method {text!r}: {first_problem(error, Prune)}", ExitCode.USAGE) from error
    return method


def stage_text(stage: Stage, ratio: str | None = None) -> str:
    """A stage as `parse_method` reads it; another word may stand for its ratio."""
    options = ",".join(f"{name}={value}" for name, value in stage.options.items())
    layer = "" if stage.layer < 0 else f"@{stage.layer}"
    number = f"{stage.ratio!r}".removesuffix(".0") if ratio is None else ratio
    return f"{stage.selector}{layer}:{number}{f'{{{options}}}' if options else ''}"


def _stage(text: str, part: str) -> Stage:
    match = _STAGE.fullmatch(part)
    if match is None:
        raise CapaError(f"method {text!r}: {part!r} is no stage; {_GRAMMAR}", ExitCode.USAGE)
    given: dict[str, Any] = {"selector": match["selector"], "ratio": _number(text, "ratio", match["ratio"])}
    if match["layer"] is not None:
        given["layer"] = int(match["layer"])
    if match["options"]:
        given["options"] = dict(_option(text, entry) for entry in match["options"].split(","))
    try:
        return Stage.model_validate(given)
    except ValidationError as error:
        raise CapaError(f"method {text!r}: {first_problem(error, Stage)}", ExitCode.USAGE) from error


def _option(text: str, entry: str) -> tuple[str, float]:
    name, equals, value = entry.strip().partition("=")
    if not equals:
        raise CapaError(f"method {text!r}: option {entry!r}: write name=value", ExitCode.USAGE)
    number = _number(text, name, value)
    return name, int(number) if number.is_integer() and "." not in value else number


def _number(text: str, what: str, value: str) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise CapaError(f"method {text!r}: {what} {value!r} is no number", ExitCode.USAGE) from error
