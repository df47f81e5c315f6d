"""A recipe: what one model becomes. Read from `graphs/<name>.toml` or from the user's own file."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from capa_export.base.errors import CapaError, ExitCode
from capa_export.base.toml import Settings, first_problem, read_toml, shipped, shipped_names
from capa_export.config.pixels import PixelBounds
from capa_export.selectors.selector import Option, SelectorChoice, load_selector, selectors

__all__ = [
    "FFN",
    "Bound",
    "Gate",
    "Prune",
    "Recipe",
    "Stage",
    "check_layers",
    "kept_tokens",
    "load_recipe",
    "ranges",
    "recipe_of",
]


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

    schedule: tuple[Stage, ...] = Field(min_length=1)
    alternatives: tuple[int, ...] = ()
    """Other layers that were published for this model, selectable with `--prune-layer`."""
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


class FFN(Settings):
    """Which FFNs of visual tokens become a scale."""

    eta: float = Field(default=0.96, gt=0, lt=1)
    """A layer is linear when the mean cosine(x, x + FFN(norm(x))) of its visual tokens exceeds this (CAPA's value)."""
    paper_layers: tuple[int, ...] = ()
    """The layers the paper lists; printed beside the measured ones, never used."""


class Calibration(Settings):
    """What the calibration runs on."""

    samples: int = Field(default=500, ge=1)
    prompt: str = "Describe this image."
    """Question asked of every picture of a folder."""


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
    flip_distance: Bound
    """How far from the cut a token may lie that is kept on one side only: relative lead of its score."""
    flip_noise_ratio: Bound | None = None
    """The same, in units of the noise of the scores; the larger of the two counts."""
    same_tokens: bool = False
    """Whether every greedy token must be the same."""


class Parity(Settings):
    """How the artefacts are validated."""

    prompts: int = Field(default=32, ge=1)
    steps: int = Field(default=16, ge=2)
    """Tokens compared per prompt: what prefill says, and what decode says after each that it is fed."""
    accuracy_samples: int = Field(default=200, ge=0)
    """Questions with known answers on which dense, CAPA and random pruning are compared."""
    fp32: Gate
    fp16: Gate
    bf16: Gate


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
    fp32_layers: tuple[str, ...] = ()
    """Parts computed in FP32 whatever the precision, as `--fp32-layers` takes them; the audit adds its own."""
    calibration: Calibration = Calibration()
    parity: Parity

    def with_options(
        self,
        *,
        ratio: float | None = None,
        prune_layer: int | None = None,
        selector: str | None = None,
        min_keep_per_image: int | None = None,
        fp32_layers: Sequence[str] | None = None,
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
        schedule = self.prune.schedule
        if any(given is not None for given in (ratio, prune_layer, selector)) and len(schedule) > 1:
            raise CapaError(
                f"{self.name}: --ratio, --prune-layer and --selector need a schedule of one stage, this recipe has "
                f"{len(schedule)}; edit prune.schedule in a recipe of your own and pass it with --model",
                ExitCode.USAGE,
            )
        assert schedule
        prune: dict[str, Any] = {"schedule": (_changed(schedule[0], ratio, prune_layer, selector), *schedule[1:])}
        if min_keep_per_image is not None:
            prune["min_keep_per_image"] = min_keep_per_image
        changed: dict[str, Any] = {"prune": self.prune.model_copy(update=prune)}
        if min_pixels is not None or max_pixels is not None:
            changed["pictures"] = self.pictures.with_options(min_pixels, max_pixels)
        if fp32_layers is not None:
            from capa_export.config.parts import parse_unit

            for word in fp32_layers:
                parse_unit(word)
            changed["fp32_layers"] = tuple(dict.fromkeys(fp32_layers))
        return self.model_copy(update=changed)

    def for_any_target(self) -> "Recipe":
        """This recipe without what a target added to it."""
        pictures = self.pictures.model_dump(include={"min_pixels", "max_pixels"}, exclude_none=True)
        values = self.model_dump(exclude_unset=True, exclude={"pictures"})
        return Recipe.model_validate({**values, **({"pictures": pictures} if pictures else {})})


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
        raise CapaError(f"{first_problem(error, Stage)}; see --selector and --prune-layer", ExitCode.USAGE) from error


def kept_tokens(num_visual: int, ratio: float) -> int:
    """Visual tokens that survive: ceil(n * (1 - ratio)), at least 1, and 0 of 0."""
    # Rounding first keeps ceil(100 * (1 - 0.9)) at 10: 1 - 0.9 is a little more than 0.1 in binary.
    return min(num_visual, max(1, ceil(round(num_visual * (1 - ratio), 9))))


def check_layers(recipe: Recipe, num_layers: int) -> None:
    """Refuse a schedule that does not fit a decoder of `num_layers`, before anything is run.

    Raises:
        CapaError: a prune layer that the decoder does not have, or that is its last.
    """
    for stage in recipe.prune.schedule:
        if stage.layer >= num_layers - 1:
            raise CapaError(
                f"{recipe.name}: prune layer {stage.layer}, but this checkpoint's decoder has layers 0 to "
                f"{num_layers - 1} and the last one is too late; choose a smaller --prune-layer"
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
