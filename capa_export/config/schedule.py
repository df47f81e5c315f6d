"""A schedule: selectors at layers with ratios, and what becomes of visual FFNs; and the grammar that writes it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from typing import Any, Literal, get_args

from pydantic import Field, ValidationError, model_validator

from capa_export.base.errors import CapaError, ExitCode
from capa_export.base.toml import Settings, first_problem
from capa_export.selectors.selector import Option, SelectorChoice, load_selector, selectors

__all__ = [
    "FFNs",
    "Method",
    "Prune",
    "Stage",
    "kept_tokens",
    "parse_method",
    "parse_schedule",
    "schedule_text",
    "stage_text",
]

FFNs = Literal["scale", "full", "skip", "per-image"]
"""Of visual tokens in linear layers: a scale in their place, as they are, left out, or a scale where the layer is
linear for this very prompt."""

_STAGE = re.compile(
    r"(?P<selector>[a-z][a-z0-9-]*)(?:@(?P<layer>\d{1,9}))?:(?P<ratio>[0-9.eE+-]+)(?:\{(?P<options>[^{}]*)\})?"
)
_EXAMPLE = "selector@layer:ratio, as capa@2:0.75 or divprune:0.9/full, stages joined with +"
_WHERE = {"attention": "after", "entry": "before"}


class Stage(Settings):
    """One entry of the pruning schedule."""

    layer: int = Field(default=-1, ge=-1)
    """0-based decoder layer, the first whose KV cache is without the dropped tokens; -1 before the decoder, which is
    for selectors that act there."""
    ratio: float = Field(ge=0, lt=1)
    """Fraction of the prompt's visual tokens that are gone after this stage."""
    selector: str = "capa"
    """What chooses the tokens: a module of `capa_export.selectors.selector`."""
    options: dict[str, Option] = Field(default_factory=dict)
    """Of the selector, in place of its own."""

    @property
    def chosen(self) -> SelectorChoice:
        return SelectorChoice(self.selector, self.options)

    @property
    def where(self) -> str:
        """For people: `after layer 2`, `before layer 2`, `before the decoder`."""
        place = self.chosen.place
        return "before the decoder" if place == "input" else f"{_WHERE[place]} layer {self.layer}"

    @model_validator(mode="before")
    @classmethod
    def _own_layer(cls, given: Any) -> Any:
        """A selector that was published with a layer acts there unless another is named."""
        if not isinstance(given, dict) or "layer" in given or given.get("selector") not in selectors():
            return given
        layer = load_selector(given["selector"]).layer
        return given if layer is None else {**given, "layer": layer}

    @model_validator(mode="after")
    def _fits_selector(self) -> "Stage":
        try:
            selector = load_selector(self.selector)
        except CapaError as error:
            raise ValueError(str(error)) from error
        if unknown := [name for name in self.options if name not in selector.options]:
            known = ", ".join(selector.options) or "none"
            raise ValueError(f"selector {self.selector} has no option {unknown[0]!r}; its options: {known}")
        for name, value in self.options.items():
            if problem := selector.options[name].problem(value):
                raise ValueError(f"selector {self.selector}: option {name}: {problem}")
        if selector.place == "input" and self.layer >= 0:
            raise ValueError(f"selector {self.selector} acts before the decoder and takes no layer")
        if selector.place != "input" and self.layer < (1 if selector.place == "entry" else 0):
            least = "1 or more, for the attention of the one before" if selector.place == "entry" else "0 or more"
            raise ValueError(f"selector {self.selector} needs a layer of {least}")
        return self


class Prune(Settings):
    """Where visual tokens are dropped."""

    schedule: tuple[Stage, ...] = Field(min_length=1, max_length=100)
    alternatives: tuple[int, ...] = ()
    """Other layers that were published for this model."""
    min_keep_per_image: int = Field(default=1, ge=0)
    """Visual tokens that each image keeps at every stage, so that one cannot starve another."""

    def num_keep(self, images: Sequence[int]) -> list[int]:
        """Visual tokens kept at each stage, of images of so many visual tokens each.

        Raises:
            CapaError: fewer than a selector can choose.
        """
        least = sum(min(self.min_keep_per_image, count) for count in images)
        entering, kept = sum(images), list[int]()
        for stage in self.schedule:
            leaving = max(least, kept_tokens(sum(images), stage.ratio))
            fewest = stage.chosen.least
            if leaving < min(entering, fewest):
                raise CapaError(
                    f"selector {stage.selector} chooses {fewest} tokens or more, and ratio {stage.ratio:g} leaves "
                    f"{leaving} of {sum(images)}; use a smaller ratio or larger pictures"
                )
            kept.append(leaving)
            entering = leaving
        return kept

    def with_stage(self, ratio: float | None, layer: int | None, selector: str | None) -> "Prune":
        """This pruning with its one stage changed.

        Raises:
            CapaError: there are several stages, or the changed one is impossible.
        """
        stage, *later = self.schedule
        if later:
            text = schedule_text(self.schedule)
            raise CapaError(
                f"{text} has {len(self.schedule)} stages, of which no option changes one; write all of it, as "
                f"--schedule {text}",
                ExitCode.USAGE,
            )
        return self.model_copy(update={"schedule": (_changed(stage, ratio, layer, selector),)})

    @property
    def selectors(self) -> dict[int, SelectorChoice]:
        """Layer -> what chooses there."""
        return {stage.layer: stage.chosen for stage in self.schedule}

    @model_validator(mode="after")
    def _stages_in_order(self) -> "Prune":
        layers = [stage.layer for stage in self.schedule]
        ratios = [stage.ratio for stage in self.schedule]
        if layers != sorted(set(layers)) or ratios != sorted(ratios):
            raise ValueError("layers must rise and ratios must not fall from one stage to the next")
        for before, stage in pairwise(self.schedule):
            if (before.chosen.place, stage.chosen.place) == ("attention", "entry") and before.layer == stage.layer - 1:
                raise ValueError(
                    f"selector {stage.selector} at layer {stage.layer} reads the attention of layer {before.layer}, "
                    "which a stage prunes; leave a layer between them"
                )
        return self


def kept_tokens(num_visual: int, ratio: float) -> int:
    """Visual tokens that survive: ceil(n * (1 - ratio)), at least 1, and 0 of 0."""
    # Rounding first keeps ceil(100 * (1 - 0.9)) at 10: 1 - 0.9 is a little more than 0.1 in binary.
    return min(num_visual, max(1, ceil(round(num_visual * (1 - ratio), 9))))


def _changed(stage: Stage, ratio: float | None, layer: int | None, selector: str | None) -> Stage:
    """A stage with the command line's choices; another selector acts where it acts by itself."""
    options = stage.options
    if selector is not None and selector != stage.selector:
        own, options = load_selector(selector), {}
        if own.place == "input":
            stage = stage.model_copy(update={"layer": -1})
        elif layer is None and (own.layer is not None or stage.layer < 0):
            layer = own.layer
    given = {"ratio": ratio, "layer": layer, "selector": selector, "options": options}
    changed = {**stage.model_dump(), **{key: value for key, value in given.items() if value is not None}}
    try:
        return Stage.model_validate(changed)
    except ValidationError as error:
        raise CapaError(f"{first_problem(error, Stage)}; write {_EXAMPLE}", ExitCode.USAGE) from error


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


def parse_method(text: str, what: str = "method") -> Method:
    """Read `dense`, or `STAGE[+STAGE...][/FFN]`.

    A stage is `selector[@layer]:ratio[{option=value,...}]`; layers belong to selectors inside the decoder. FFN is one
    of `FFNs` or `eta=NUMBER`, which is `scale` with another eta; `scale` where nothing is said. `dense/scale` and its
    like drop no tokens.

    Args:
        text: what is read.
        what: how an error calls it.

    Raises:
        CapaError: it reads otherwise, or names what there is not.
    """
    try:
        return _parsed(text)
    except ValueError as error:
        raise CapaError(f"{what} {text!r}: {error}; write {_EXAMPLE}", ExitCode.USAGE) from error


def parse_schedule(text: str) -> Method:
    """Read `--schedule`: a method that a graph holds.

    Raises:
        CapaError: it is no method, or one that drops nothing or treats FFNs as no graph does.
    """
    method = parse_method(text, "--schedule")
    if not method.stages:
        raise CapaError(
            f"--schedule {text!r}: has no stage; write one, as capa@2:0.75, or capa@2:0 to drop nothing", ExitCode.USAGE
        )
    if method.ffn not in {"scale", "full"}:
        stages = schedule_text(method.stages)
        raise CapaError(
            f"--schedule {text!r}: {method.ffn} is for `evaluate`; write {stages}, {stages}/full or {stages}/eta=0.97",
            ExitCode.USAGE,
        )
    return method


def schedule_text(stages: Sequence[Stage]) -> str:
    """Stages as `parse_method` reads them."""
    return "+".join(map(stage_text, stages))


def stage_text(stage: Stage, ratio: str | None = None) -> str:
    """A stage as `parse_method` reads it; another word may stand for its ratio."""
    options = ",".join(f"{name}={value}" for name, value in stage.options.items())
    layer = "" if stage.layer < 0 else f"@{stage.layer}"
    number = f"{stage.ratio!r}".removesuffix(".0") if ratio is None else ratio
    return f"{stage.selector}{layer}:{number}{f'{{{options}}}' if options else ''}"


def _parsed(text: str) -> Method:
    """A method, or a ValueError that says what is wrong with it."""
    stages, _, ffn = text.strip().partition("/")
    eta = None
    if ffn.startswith("eta="):
        eta, ffn = _number("eta", ffn.removeprefix("eta=")), "scale"
        if not 0 < eta < 1:
            raise ValueError("eta must be between 0 and 1")
    elif ffn and ffn not in get_args(FFNs):
        raise ValueError(f"unknown {ffn!r}; known: {', '.join(get_args(FFNs))}, eta=NUMBER")
    if stages == "dense":
        return Method(text, (), ffn or "full", eta)  # pyright: ignore[reportArgumentType]  # It is one of FFNs.
    found = tuple(_stage(part) for part in re.split(r"\+(?=[a-z])", stages))
    try:
        Prune(schedule=found)
    except ValidationError as error:
        raise ValueError(first_problem(error, Prune)) from error
    return Method(text, found, ffn or "scale", eta)  # pyright: ignore[reportArgumentType]  # As above.


def _stage(text: str) -> Stage:
    match = _STAGE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no stage")
    given: dict[str, Any] = {"selector": match["selector"], "ratio": _number("ratio", match["ratio"])}
    if match["layer"] is not None:
        given["layer"] = int(match["layer"])
    if match["options"]:
        given["options"] = dict(_option(entry) for entry in match["options"].split(","))
    try:
        return Stage.model_validate(given)
    except ValidationError as error:
        raise ValueError(first_problem(error, Stage)) from error


def _option(entry: str) -> tuple[str, Option]:
    name, equals, value = entry.strip().partition("=")
    if not equals:
        raise ValueError(f"option {entry!r}: write name=value")
    number = _number(name, value)
    return name, int(number) if number.is_integer() and "." not in value else number


def _number(what: str, value: str) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise ValueError(f"{what} {value!r} is no number") from error
