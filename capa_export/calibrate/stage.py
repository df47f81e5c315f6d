"""The calibration stage: measures the dense model, or adopts a calibration that was made elsewhere."""

from pathlib import Path
from typing import Any

from capa_export.base.code import versions
from capa_export.base.errors import CapaError, ExitCode
from capa_export.base.progress import say
from capa_export.bundle.store import Bundle, run_stage
from capa_export.calibrate.measurement import measure_samples
from capa_export.calibrate.scaled_sets import EFFECT
from capa_export.calibrate.sums import CALIBRATION, ROUNDING, Calibration, check_owner
from capa_export.calibrate.unfinished import UnfinishedSums
from capa_export.calibrate.weights import choose_weights
from capa_export.config.options import BuildOptions
from capa_export.config.recipe import Recipe, ranges
from capa_export.data.samples import JUDGES, samples_from
from capa_export.model.files import check_files
from capa_export.model.generation import eos_token_ids
from capa_export.model.memory import calibration_bytes, exceeds_memory, require_eager_memory
from capa_export.model.model import Model

__all__ = ["adopt_calibration", "calibrate", "with_effect"]

_CODE = ("capa_export.calibrate.measurement",)
"""Modules whose code a stored calibration depends on."""
_EFFECT_CODE = ("capa_export.calibrate.effect", "capa_export.model.model", "capa_export.model.streamed")
"""Modules whose code the layers that are taken depend on."""


def calibrate(model: Model, bundle: Bundle, options: BuildOptions) -> Calibration:
    """Measure the dense model into a bundle, or read the calibration of an earlier run.

    Raises:
        CapaError: the model does not load or does not fit, a sample cannot be used, or the given calibration is of
            another model.
    """
    check_files(model)
    _check_workers(model, options)
    model.check_pictures()
    model.remember_digests(bundle)
    choose_weights(model, bundle, options)
    if options.calibration is not None:
        calibration = Calibration.load(options.calibration)
        check_owner(calibration, model, options.calibration)
        with bundle.claimed():
            adopt_calibration(bundle, calibration, model.recipe)
            model.record_digests(bundle)
        if not calibration.measured(model.recipe.ffn):
            return with_effect(model, bundle, options)
        _say_linear(calibration, model.recipe)
        return calibration

    recipe = model.recipe
    samples = samples_from(options.images, recipe, options.samples or recipe.calibration.samples, split="train")
    key = [versions("torch", "transformers", code_of=_CODE), model.digest, model.prompt_settings, samples.digest()]

    def work(scratch: Path) -> dict[str, Any]:
        by_layer = _goes_by_layer(model, bundle, options, key)
        with bundle.unfinished("calibrate", [key, by_layer]) as folder:
            unfinished = UnfinishedSums(folder)
            if unfinished.load() is not None:
                option = "--layer-by-layer" if by_layer else "--in-memory"
                say(f"{'':<14}goes on where it was interrupted, as with {option}")
            calibration = measure_samples(model, samples, options.workers, unfinished, by_layer=by_layer)
        calibration.save(scratch / CALIBRATION)
        return {**calibration.summary(recipe.ffn), ROUNDING: recipe.rounding}

    with bundle.claimed():
        about: Any = {"outdates": ["effect", "validate"], "about": lambda: {"hashed": model.hashed}}
        run_stage(bundle, "calibrate", key, [CALIBRATION], work, **about)
    calibration = with_effect(model, bundle, options, told=True)
    # The stages to come need the memory more than validation needs the second that loading takes.
    model.forget_eager()
    return calibration


def with_effect(model: Model, bundle: Bundle, options: BuildOptions, *, told: bool = False) -> Calibration:
    """The bundle's calibration, with what sets of its scales do to the answers: measured unless it is known.

    Args:
        model: the checkpoint with a recipe.
        bundle: has a calibration.
        options: pictures, the number of samples, and how to hold the model.
        told: whether the user knows already that layers go one by one.

    Raises:
        CapaError: there is no calibration, a sample cannot be used, or the model does not load.
    """
    calibration, ffn = Calibration.load(bundle.folder), model.recipe.ffn
    if not options.ffn:
        return calibration
    count = min(JUDGES, options.samples or model.recipe.calibration.samples)
    samples = samples_from(options.images, model.recipe, count, split="judge")
    key = [
        versions("torch", "transformers", code_of=_EFFECT_CODE),
        [calibration.digest(), ffn.eta, ffn.budget, model.recipe.prune.model_dump(mode="json")],
        [model.prompt_settings, samples.digest()],
    ]

    def work(scratch: Path) -> dict[str, Any]:
        from capa_export.calibrate.effect import measure_effect

        stop = eos_token_ids(model.source.checkpoint.sidecars)
        about: Any = {"stop": stop, "report": model.report}
        opened = _eager(model, options, told=told), model.family, model.prompter
        effect = measure_effect(*opened, samples, calibration, model.recipe, **about)
        effect.save(scratch / EFFECT)
        return {"layers": effect.chosen.layers}

    with bundle.claimed():
        run_stage(bundle, "effect", key, [EFFECT], work, outdates=["validate"])
        calibration = Calibration.load(bundle.folder)
    _say_linear(calibration, model.recipe)
    return calibration


def _eager(model: Model, options: BuildOptions, *, told: bool) -> Any:
    """The model, run by hand: in memory, or from the checkpoint part by part where it does not fit."""
    from capa_export.model.eager import Eager
    from capa_export.model.streamed import StoredWeights, hollow_model

    needed = calibration_bytes(model.source.checkpoint.num_parameters)
    by_layer = options.layer_by_layer
    if by_layer is None:
        by_layer = not model.holds_eager and exceeds_memory("the model takes {} in FP32", needed, told=told)
    if not by_layer:
        return Eager(model.eager)
    weights = StoredWeights(model.source, model.report)
    return Eager(hollow_model(model.source, weights), weights)


def adopt_calibration(bundle: Bundle, calibration: Calibration, recipe: Recipe | None = None) -> None:
    """Put a calibration made elsewhere, under a recipe if that is known, into a bundle."""

    def work(scratch: Path) -> dict[str, Any]:
        calibration.save(scratch / CALIBRATION)
        return {"samples": calibration.samples, "adopted": True, **({ROUNDING: recipe.rounding} if recipe else {})}

    key = ["adopted", calibration.digest()]
    run_stage(bundle, "calibrate", key, [CALIBRATION], work, outdates=["effect", "validate"])
    if (effect := calibration.effect) is not None:

        def copy(scratch: Path) -> dict[str, Any]:
            effect.save(scratch / EFFECT)
            return {"layers": effect.chosen.layers, "adopted": True}

        run_stage(bundle, "effect", ["adopted", effect.model_dump(mode="json")], [EFFECT], copy)


def _check_workers(model: Model, options: BuildOptions) -> None:
    """Refuse workers that this machine's memory, or another option, does not allow."""
    if options.workers.here:
        return
    if options.layer_by_layer:
        raise CapaError("--layer-by-layer runs in one process: drop it, or --workers and --ray", ExitCode.USAGE)
    require_eager_memory(model, options.workers)


def _goes_by_layer(model: Model, bundle: Bundle, options: BuildOptions, key: list[Any]) -> bool:
    """Whether to go layer by layer: as the options say, as an interrupted run did, or where the model does not fit."""
    if options.layer_by_layer is not None:
        return options.layer_by_layer
    if not options.workers.here:
        return False
    for by_layer in (False, True):
        folder = bundle.interrupted("calibrate", [key, by_layer])
        if folder is not None and UnfinishedSums(folder).load() is not None:
            return by_layer
    return exceeds_memory("the model takes {} in FP32", calibration_bytes(model.source.checkpoint.num_parameters))


def _say_linear(calibration: Calibration, recipe: Recipe) -> None:
    linear = calibration.linear_layers(recipe.ffn.eta)
    paper = f"; the paper lists {ranges(recipe.ffn.paper_layers)}" if recipe.ffn.paper_layers else ""
    say(f"{'':<14}visual FFNs linear (cosine > {recipe.ffn.eta:g}) in layers {ranges(linear)}{paper}")
    if calibration.effect is not None:
        say(f"{'':<14}{calibration.effect.words}")
