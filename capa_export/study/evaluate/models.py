"""The models under evaluation, eager or a bundle: the methods that they can do, and what their answers depend on."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from capa_export.base.code import versions
from capa_export.base.errors import CapaError, ExitCode
from capa_export.base.workers import Workers
from capa_export.bundle.store import Bundle, digest_of
from capa_export.calibrate.stage import calibrate
from capa_export.calibrate.sums import Calibration
from capa_export.calibrate.weights import choose_weights
from capa_export.config.options import BuildOptions
from capa_export.config.pixels import PixelBounds
from capa_export.config.provider import Provider
from capa_export.config.recipe import Recipe, ranges, recipe_of
from capa_export.config.schedule import Method, parse_method, schedule_text, stage_text
from capa_export.model.files import check_files
from capa_export.model.memory import require_eager_memory
from capa_export.model.model import Model
from capa_export.model.quantized.tensor import quantization
from capa_export.run.bundled import require_memory
from capa_export.run.providers import require_provider
from capa_export.selectors.selector import load_selector
from capa_export.study.evaluate.answers import DENSE, Answerer

__all__ = ["EvaluatedModel", "bundle_model", "check_fits", "eager_model", "parse_methods", "product_of_methods"]


@dataclass(frozen=True, kw_only=True)
class EvaluatedModel:
    """A model whose methods are evaluated."""

    source: str
    """Source of the model, for people."""
    digest: str
    """Digest of all files that the answers depend on."""
    runs: Literal["eager fp32", "onnx"]
    keys: Mapping[str, str]
    """Method -> digest of what it does, dense first."""
    prepare: Callable[[], Answerer]
    """Opens the model in whatever process."""
    max_new_tokens: int
    notes: tuple[str, ...] = ()


def parse_methods(texts: Sequence[str]) -> dict[str, Method]:
    """Parse methods by their names, dense first whether it is named or not.

    Raises:
        CapaError: one reads otherwise than a method does, or there is none.
    """
    methods = {text: parse_method(text) for text in texts if text != DENSE}
    if not methods and DENSE not in texts:
        raise CapaError("name what to evaluate: --method capa@2:0.75, as often as there are methods", ExitCode.USAGE)
    return {DENSE: parse_method(DENSE), **methods}


def product_of_methods(
    recipe: Recipe,
    selectors: Sequence[str] = (),
    layers: Sequence[int] = (),
    ratios: Sequence[float] = (),
    ffns: Sequence[str] = (),
) -> list[str]:
    """Every selector at every layer and ratio, with every treatment of the visual FFNs; the recipe's own where empty.

    Raises:
        CapaError: the recipe's own is a schedule of several stages, of which no part can be changed alone.
    """
    own, *later = recipe.prune.schedule
    if not (selectors or layers or ratios):
        texts = [schedule_text(recipe.prune.schedule)]
    elif later:
        raise CapaError(
            f"{recipe.name}: has a schedule of {1 + len(later)} stages; name methods with --method instead of "
            "--selector, --layer and --ratio",
            ExitCode.USAGE,
        )
    else:
        names = list(selectors) or [own.selector]
        if layers and all(load_selector(name).place == "input" for name in names):
            raise CapaError(f"--layer: {', '.join(names)} acts before the decoder and takes none", ExitCode.USAGE)
        texts = list[str]()
        for name in names:
            selector = load_selector(name)
            usual = own.layer if selector.layer is None or name == own.selector else selector.layer
            places = [-1] if selector.place == "input" else layers or [usual]
            options = own.options if name == own.selector else {}
            for layer, ratio in itertools.product(places, ratios or [own.ratio]):
                changes = {"selector": name, "layer": layer, "ratio": ratio, "options": options}
                texts.append(stage_text(own.model_copy(update=changes)))
    return [f"{text}/{ffn}" if ffn else text for text in texts for ffn in ffns or [""]]


def eager_model(
    model: Model, bundle: Bundle, options: BuildOptions, methods: Mapping[str, Method], max_new_tokens: int
) -> EvaluatedModel:
    """The Hugging Face model; where a method replaces visual FFNs, it is calibrated into a folder first.

    Raises:
        CapaError: a method does not fit the model, or the model this machine's memory, before anything is run.
    """
    from capa_export.study.evaluate.eager_answers import EagerAnswers

    for method in methods.values():
        check_fits(model, method)
    require_eager_memory(model, options.workers)
    check_files(model)
    choose_weights(model, bundle, options)
    calibration = (
        calibrate(model, bundle, options) if any(method.ffn != "full" for method in methods.values()) else None
    )
    model.record_digests(bundle)
    # Each worker opens it again.
    opened = model if options.workers.here else model.unopened()

    def key(method: Method) -> str:
        prune = method.prune(model.recipe.prune.min_keep_per_image)
        ffn: list[Any] = [method.ffn]
        if calibration is not None and method.ffn != "full":
            scaled = calibration.scaled_layers(model.recipe.ffn, method.eta)
            ffn += [(method.eta or model.recipe.ffn.eta), scaled, calibration.digest()]
        return _key(EagerAnswers, prune and prune.model_dump(), ffn, max_new_tokens, model.recipe.pictures)

    return EvaluatedModel(
        source=model.checkpoint_source,
        digest=digest_of([model.digest, model.sidecar_digests]),
        runs="eager fp32",
        keys={name: key(method) for name, method in methods.items()},
        prepare=EagerAnswers(model=opened, methods=methods, calibration=calibration, max_new_tokens=max_new_tokens),
        max_new_tokens=max_new_tokens,
        notes=_notes(model, calibration),
    )


def _notes(model: Model, calibration: Calibration | None) -> tuple[str, ...]:
    """What all methods share, in sentences: quantized weights, and the scales of visual FFNs."""
    weights = quantization(model.source.tensors)
    notes = (f"weights of all, dense too: {weights}",) if weights else ()
    if calibration is None:
        return notes
    ffn = model.recipe.ffn
    linear = f"visual FFNs are linear (cosine > {ffn.eta:g}) in layers {ranges(calibration.linear_layers(ffn.eta))}"
    return (*notes, linear, *([calibration.effect.words] if calibration.effect else []))


def check_fits(model: Model, method: Method) -> None:
    """Refuse a method that the model cannot do.

    Raises:
        CapaError: a layer that the decoder does not have, or a selector that the family does not offer.
    """
    prune = method.prune(model.recipe.prune.min_keep_per_image)
    if prune is None:
        return
    asked = model.with_recipe(model.recipe.model_copy(update={"prune": prune}))
    try:
        asked.check_layers()
    except CapaError as error:
        raise CapaError(f"method {method.name}: {error}", ExitCode.USAGE) from error


def bundle_model(
    bundle: Bundle,
    methods: Mapping[str, Method],
    max_new_tokens: int,
    *,
    bounds: PixelBounds | None = None,
    provider: Provider = "cpu",
    workers: Workers | None = None,
    trust_remote_code: bool = False,
) -> EvaluatedModel:
    """A bundle's graphs, which know one schedule; every ratio of it is theirs.

    Raises:
        CapaError: a method is none of them, a file of the bundle was changed, or this machine's memory is too small.
    """
    from capa_export.study.evaluate.bundle_answers import BundleAnswers, digest_to_ask

    require_provider(provider)
    if workers is None or workers.ray is None:
        require_memory(bundle, copies=(workers and workers.count) or 1)

    bundle.verify("export")
    recipe = recipe_of(bundle.manifest, bundle.folder)
    bounds = recipe.pictures if bounds is None else bounds
    linear = bundle.stage("export")["result"]["linear_layers"]
    own = [(stage.layer, stage.chosen) for stage in recipe.prune.schedule]
    for method in methods.values():
        if method.name == DENSE:
            continue
        if [(stage.layer, stage.chosen) for stage in method.stages] != own:
            written = "+".join(stage_text(stage, "RATIO") for stage in recipe.prune.schedule)
            raise CapaError(
                f"method {method.name}: the graphs of {bundle.folder} do {written} at any ratio, and no other; "
                "evaluate the model itself, with --model",
                ExitCode.USAGE,
            )
        if method.eta is not None or method.ffn not in (("scale",) if linear else ("scale", "full")):
            raise CapaError(
                f"method {method.name}: what stands for visual FFNs is part of the graphs of {bundle.folder}; "
                "leave out what comes after the slash",
                ExitCode.USAGE,
            )
    # Another provider rounds otherwise.
    own_key = [] if provider == "cpu" else [provider]
    note = "the scales of the bundle's visual FFNs are part of its graphs: its dense keeps all tokens, and has them too"
    return EvaluatedModel(
        source=str(bundle.folder.resolve()),
        digest=bundle.digest("export"),
        runs="onnx",
        keys={
            name: _key(
                BundleAnswers, [stage.ratio for stage in method.stages], own_key, max_new_tokens, bounds, "onnxruntime"
            )
            for name, method in methods.items()
        },
        prepare=BundleAnswers(
            folder=bundle.folder.resolve(),
            digest=digest_to_ask(bundle),
            methods=methods,
            max_new_tokens=max_new_tokens,
            bounds=bounds,
            provider=provider,
            trust_remote_code=trust_remote_code,
        ),
        max_new_tokens=max_new_tokens,
        notes=(note,) if linear else (),
    )


def _key(answers: type, prune: object, ffn: object, max_new_tokens: int, bounds: PixelBounds, *packages: str) -> str:
    """The digest of what a method does, and of the code that answers: the module of `answers`."""
    made_by = versions(
        "numpy", "pillow", "tokenizers", "torch", "transformers", *packages, code_of=[answers.__module__]
    )
    return digest_of([prune, ffn, max_new_tokens, bounds.model_dump(exclude_none=True), made_by])
