"""A recipe: what one model becomes. Read from `graphs/<name>.toml` or from the user's own file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from capa_export.base.errors import CapaError, ExitCode
from capa_export.base.toml import Settings, first_problem, read_toml, shipped, shipped_names
from capa_export.config.gates import Parity
from capa_export.config.pixels import PixelBounds
from capa_export.config.quantization import (
    HeadQuantization,
    Quantization,
    VisionQuantization,
    looks_at_samples,
    parse_head_quantization,
    parse_quantization,
    parse_vision_quantization,
)
from capa_export.config.schedule import Method, Prune, stage_text

__all__ = [
    "FFN",
    "MethodBounds",
    "Recipe",
    "check_layers",
    "judging_recipe",
    "load_recipe",
    "ranges",
    "recipe_of",
]


class FFN(Settings):
    """Which FFNs of visual tokens become a scale."""

    eta: float = Field(default=0.96, gt=0, lt=1)
    """A layer is linear when the mean cosine(x, x + FFN(norm(x))) of its visual tokens exceeds this (CAPA's value)."""
    budget: float = Field(default=0.02, ge=0)
    """Nats that the scales of all chosen layers together may cost: mean KL of the next token."""
    paper_layers: tuple[int, ...] = ()
    """The layers the paper lists; printed beside the measured ones, never used."""


class MethodBounds(Settings):
    """What the method may change."""

    least_agreement: float = Field(default=0.9, ge=0, le=1)
    """Least share of the questions that are answered as dense answers them, token by token."""


class Calibration(Settings):
    """What the calibration runs on."""

    samples: int = Field(default=500, ge=1)
    prompt: str = "Describe this image."
    """Question asked of every picture of a folder."""


class Recipe(Settings):
    """All that a build needs to know about a model, besides the checkpoint itself."""

    name: str
    family: str
    """Module of `capa_export.model.families` that knows this architecture."""
    checkpoint: str
    """Hub id, or a path relative to the recipe's folder, used when no checkpoint is given."""
    model_types: tuple[str, ...] = ()
    """What `config.json` calls the models it is for: `internvl`, or `internvl/qwen3` where the decoder decides."""
    published: tuple[str, ...] = ()
    """Hub ids of checkpoints that it takes."""
    picture: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = (896, 896)
    """Width and height of the picture that plans are made for."""
    pictures: PixelBounds = PixelBounds()
    """Between what pictures are resized to; builds add what their target takes."""
    scenes: bool = False
    """Whether calibration and validation use the built-in scenes when no pictures are given."""
    prune: Prune
    ffn: FFN = FFN()
    method: MethodBounds = MethodBounds()
    fp32_layers: tuple[str, ...] = ()
    """Parts computed in FP32 whatever the precision, as `--fp32-layers` takes them; the audit adds its own."""
    quantize: Quantization | None = None
    """What the weights of the decoder's layers are, as `--quantize` takes it; None for what the checkpoint has."""
    quantize_head: HeadQuantization = "none"
    """What the weight of the LM head is rounded to, as `--quantize-head` takes it."""
    quantize_vision: VisionQuantization = "none"
    """What the weights of the vision tower's blocks are rounded to, as `--quantize-vision` takes it."""
    auto_precision: bool = False
    """Whether the fewest decoder layers stay as they are that bring what rounding costs within the budget."""
    quantization_budget: float = Field(default=0.02, ge=0)
    """Nats that rounding may cost then: mean KL of the next token, nothing pruned."""
    calibration: Calibration = Calibration()
    parity: Parity = Field(default_factory=Parity)

    @property
    def decided_by_samples(self) -> bool:
        """Whether samples decide what weights are rounded to."""
        return looks_at_samples(self.quantize) or self.auto_precision

    @property
    def rounding(self) -> dict[str, Any]:
        """All that is asked for the weights."""
        layers = {"quantize": self.quantize, "budget": self.quantization_budget if self.auto_precision else None}
        others = {"head": self.quantize_head, "vision": self.quantize_vision}
        return {**layers, **{part: word for part, word in others.items() if word != "none"}}

    @property
    def rounding_words(self) -> str:
        """The options that round weights."""
        said = {
            "--quantize": self.quantize,
            "--quantize-head": self.quantize_head,
            "--quantize-vision": self.quantize_vision,
        }
        return " and ".join(f"{option} {word}" for option, word in said.items() if word not in (None, "none"))

    def unrounded(self) -> "Recipe":
        """This recipe with the checkpoint's weights as they are."""
        return self.model_copy(update={"quantize": None, "quantize_head": "none", "quantize_vision": "none"})

    def with_options(
        self,
        *,
        schedule: Method | None = None,
        ratio: float | None = None,
        prune_layer: int | None = None,
        selector: str | None = None,
        min_keep_per_image: int | None = None,
        ffn_budget: float | None = None,
        fp32_layers: Sequence[str] | None = None,
        quantize: str | None = None,
        quantize_head: str | None = None,
        quantize_vision: str | None = None,
        auto_precision: bool = False,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> "Recipe":
        """This recipe with the command line's choices in place.

        Raises:
            CapaError: an option out of range, or one that a schedule of several stages cannot take.
        """
        if ratio is not None and not 0 <= ratio < 1:
            raise CapaError(f"--ratio {ratio:g}: the fraction of visual tokens removed is 0 <= r < 1", ExitCode.USAGE)
        if prune_layer is not None and prune_layer < 0:
            raise CapaError(f"--prune-layer {prune_layer}: decoder layers count from 0", ExitCode.USAGE)
        if min_keep_per_image is not None and min_keep_per_image < 0:
            raise CapaError(f"--min-keep-per-image {min_keep_per_image}: must not be negative", ExitCode.USAGE)
        prune, changed = self.prune, dict[str, Any]()
        if schedule is not None:
            prune = prune.model_copy(update={"schedule": schedule.stages})
            if schedule.eta is not None:
                changed["ffn"] = self.ffn.model_copy(update={"eta": schedule.eta})
        if ffn_budget is not None:
            if not ffn_budget >= 0:
                raise CapaError(f"--ffn-budget {ffn_budget:g}: nats of KL, 0 or more", ExitCode.USAGE)
            changed["ffn"] = changed.get("ffn", self.ffn).model_copy(update={"budget": ffn_budget})
        if any(given is not None for given in (ratio, prune_layer, selector)):
            prune = prune.with_stage(ratio, prune_layer, selector)
        if min_keep_per_image is not None:
            prune = prune.model_copy(update={"min_keep_per_image": min_keep_per_image})
        changed["prune"] = prune
        if min_pixels is not None or max_pixels is not None:
            changed["pictures"] = self.pictures.with_options(min_pixels, max_pixels)
        if fp32_layers is not None:
            from capa_export.config.parts import parse_unit

            for word in fp32_layers:
                parse_unit(word)
            changed["fp32_layers"] = tuple(dict.fromkeys(fp32_layers))
        if quantize is not None:
            changed["quantize"] = parse_quantization(quantize)
            if quantize == "none":
                changed["auto_precision"] = False
        if quantize_head is not None:
            changed["quantize_head"] = parse_head_quantization(quantize_head)
        if quantize_vision is not None:
            changed["quantize_vision"] = parse_vision_quantization(quantize_vision)
        if auto_precision:
            changed["auto_precision"] = True
        if changed.get("auto_precision", self.auto_precision) and changed.get("quantize", self.quantize) in (
            None,
            "none",
        ):
            asks = "--auto-precision" if auto_precision else f"recipe {self.name}: auto_precision"
            raise CapaError(
                f"{asks} says which layers --quantize leaves as they are; say --quantize int4 too", ExitCode.USAGE
            )
        return self.model_copy(update=changed)

    def for_any_target(self) -> "Recipe":
        """This recipe without what a target added to it."""
        pictures = self.pictures.model_dump(include={"min_pixels", "max_pixels"}, exclude_none=True)
        values = self.model_dump(exclude_unset=True, exclude={"pictures"})
        return Recipe.model_validate({**values, **({"pictures": pictures} if pictures else {})})


def check_layers(recipe: Recipe, num_layers: int) -> None:
    """Refuse a schedule that does not fit a decoder of `num_layers`, before anything is run.

    Raises:
        CapaError: a prune layer that the decoder does not have, or that is its last.
    """
    for stage in recipe.prune.schedule:
        if stage.layer >= num_layers - 1:
            earlier = stage.model_copy(update={"layer": num_layers - 2})
            raise CapaError(
                f"{recipe.name}: prune layer {stage.layer}, but this checkpoint's decoder has layers 0 to "
                f"{num_layers - 1} and the last one is too late; write an earlier one, as {stage_text(earlier)}"
            )


def ranges(layers: Sequence[int]) -> str:
    """`2-5, 13`, or `none`; `layers` rise."""
    starts = [layer for layer in layers if layer - 1 not in layers]
    ends = [layer for layer in layers if layer + 1 not in layers]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True)) or "none"


def load_recipe(model: str) -> Recipe:
    """The shipped recipe called `model`, or the one in the TOML file at that path.

    Raises:
        CapaError: no such recipe, or a file that is not a valid one.
    """
    path = Path(model) if model.endswith(".toml") else shipped("graphs") / f"{model}.toml"
    if not model.endswith(".toml") and model not in shipped_names("graphs"):
        raise CapaError(
            f"unknown model {model!r}; known models: {', '.join(shipped_names('graphs'))}, "
            "or the path of a .toml recipe",
            ExitCode.USAGE,
        )
    recipe = read_toml(path, Recipe, name=path.stem)
    local = path.parent / recipe.checkpoint
    return recipe.model_copy(update={"checkpoint": str(local)}) if local.is_dir() else recipe


def judging_recipe(own: Recipe, named: str | None) -> tuple[Recipe, str | None]:
    """The recipe whose gates and bounds a bundle is held to, so that a bundle does not choose its own.

    Args:
        own: the bundle's.
        named: by the user: a shipped recipe, or the path of a .toml.

    Returns:
        The one that is named, or the shipped one of the same name; or else the bundle's own, and a sentence that says
        so where its gates are not the usual ones.

    Raises:
        CapaError: the one that is named cannot be read, or is for another family.
    """
    if named is not None or own.name in shipped_names("graphs"):
        judge = load_recipe(named or own.name)
        if judge.family == own.family:
            return judge, None
        if named is not None:
            raise CapaError(
                f"--model {named}: is for {judge.family}, and the bundle is a {own.family:.80}", ExitCode.USAGE
            )
    if own.parity == Parity() and own.method == MethodBounds():
        return own, None
    return own, (
        f"Gates and the method's bound are those of the bundle's own recipe, {own.name!r:.80}; --model holds it to "
        "those of yours."
    )


def recipe_of(manifest: Mapping[str, Any], folder: Path) -> Recipe:
    """The recipe that made the bundle in `folder`.

    Raises:
        CapaError: the manifest's recipe is damaged, or of another version.
    """
    recorded = manifest.get("recipe")
    if isinstance(recorded, Mapping):
        # Of bundles that were built when plans knew this number and not a picture's size.
        recorded = {key: value for key, value in recorded.items() if key != "visual_tokens"}
    try:
        return Recipe.model_validate(recorded)
    except ValidationError as error:
        problem = first_problem(error, Recipe)
        raise CapaError(
            f"{folder}: damaged manifest (recipe: {problem}); delete the folder and build it again"
        ) from error
