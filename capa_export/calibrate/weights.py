"""The stage that has samples decide what weights are rounded to."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from capa_export.base.code import versions
from capa_export.base.errors import CapaError, ExitCode
from capa_export.base.progress import say, tracked
from capa_export.bundle.store import Bundle, digest_of, run_stage
from capa_export.calibrate.sums import Calibration, check_owner
from capa_export.config.options import BuildOptions
from capa_export.config.quantization import looks_at_samples, rounding
from capa_export.config.recipe import ranges
from capa_export.data.samples import JUDGES, samples_from
from capa_export.model.generation import eos_token_ids
from capa_export.model.model import Model
from capa_export.model.quantized.choice import CHOICE, QUANTIZE, WeightChoice

__all__ = ["choose_weights", "take_choice"]

_CODE = ("capa_export.calibrate.activation_aware", "capa_export.calibrate.plain_layers")
"""Modules whose code a stored choice depends on."""
_SAMPLES = 32
"""Prompts that are looked at, at most."""
_OUTDATES = ("calibrate", "effect", "export", "engine/", "validate", "golden", "polygraphy")


def take_choice(model: Model, bundle: Bundle, options: BuildOptions) -> None:
    """Take what samples decided for a bundle, or have them decide where they did not for this model.

    Raises:
        CapaError: a sample cannot be used, or the file was changed.
    """
    if model.choice is None and model.recipe.decided_by_samples:
        model.remember_digests(bundle)
        result = bundle.manifest["stages"].get(QUANTIZE, {}).get("result", {})
        if result.get("of") == _subject(model):
            bundle.verify(QUANTIZE)
            model.take(WeightChoice.load(bundle.folder / CHOICE))
    choose_weights(model, bundle, options)


def _subject(model: Model) -> str:
    """A digest of the weights, and of what they are to be rounded to."""
    recipe = model.recipe
    # What layers cost is measured in front of the head that there will be; factors do not depend on it.
    asked = recipe if recipe.auto_precision else recipe.model_copy(update={"quantize_head": "none"})
    return digest_of([model.digests, asked.rounding])


def choose_weights(model: Model, bundle: Bundle, options: BuildOptions) -> None:
    """Have samples decide what the model's weights are rounded to, or take what they decided in an earlier run.

    Nothing is done where they are rounded to nearest, or not at all.

    Raises:
        CapaError: a sample cannot be used, or what came with a given calibration is not for this model.
    """
    form = rounding(model.recipe.quantize)
    if model.choice is not None or form is None or not model.recipe.decided_by_samples:
        return
    if not model.source.rounds_layers:
        raise CapaError(
            f"--auto-precision: {model.checkpoint} is quantized already, and stays as it is; leave it away",
            ExitCode.USAGE,
        )
    model.remember_digests(bundle)
    if options.calibration is not None:
        choice = _given(model, options.calibration)
        _run(model, bundle, ["adopted", choice.digest()], lambda: choice)
        return
    count = min(_SAMPLES, options.samples or model.recipe.calibration.samples)
    samples = samples_from(options.images, model.recipe, count, split="train")

    def choose() -> WeightChoice:
        from capa_export.calibrate.activation_aware import choose_factors

        full = replace(model, recipe=model.recipe.model_copy(update={"quantize": None}))
        seen = tracked(samples, "choose weights: look at pictures", samples.count, model.report)
        prompts = (model.prompter.chat(sample.turns) for sample in seen)
        scales = looks_at_samples(model.recipe.quantize)
        choice = choose_factors(full.source, prompts, form, scales=scales, report=model.report)
        if not model.recipe.auto_precision:
            return choice
        from capa_export.calibrate.plain_layers import choose_plain

        stop = eos_token_ids(model.source.checkpoint.sidecars)
        return choose_plain(model, choice, judges, stop=stop, report=model.report)

    count = min(JUDGES, options.samples or model.recipe.calibration.samples)
    judges = samples_from(options.images, model.recipe, count, split="judge")
    made_by = versions("torch", "transformers", code_of=_CODE)
    judged = [judges.digest()] if model.recipe.auto_precision else []
    _run(model, bundle, [made_by, model.prompt_settings, samples.digest(), *judged], choose)
    if model.choice is not None and model.choice.tried:
        _say_plain(model.choice, model.recipe.quantization_budget)


def _given(model: Model, calibration: Path) -> WeightChoice:
    """The choice beside a calibration, found to be of this model and what its recipe asks for."""
    path = (calibration if calibration.is_dir() else calibration.parent) / CHOICE
    if calibration.is_dir() and path.exists():
        Bundle.open(calibration).verify(QUANTIZE)
    choice, budget = WeightChoice.load(path), model.recipe.rounding["budget"]
    if choice.budget != budget:
        asked = ["without --auto-precision" if one is None else f"for {one:g} nats" for one in (choice.budget, budget)]
        raise CapaError(f"{path}: weights were chosen {asked[0]}, not {asked[1]}; ask for the same, or calibrate again")
    taken = model.with_recipe(model.recipe)
    taken.take(choice)
    check_owner(Calibration.load(calibration), taken, calibration)
    return choice


def _say_plain(choice: WeightChoice, budget: float) -> None:
    """Say which layers are not rounded, and what that does."""
    kl = dict(choice.tried)
    found = f"layers {ranges(choice.plain)} stay plain" if choice.plain else "no layer stays plain"
    within = kl.get(len(choice.plain), 0.0)
    all_rounded = f"; with none plain it would be {kl[0]:.2g} nats" if choice.plain else ""
    say(f"{'':<14}{found}: KL {within:.2g} nats from full precision, budget {budget:g}{all_rounded}")


def _run(model: Model, bundle: Bundle, key: list[Any], choose: Callable[[], WeightChoice]) -> None:
    """Run the stage unless its result is current, and have the model take it."""

    def work(scratch: Path) -> dict[str, Any]:
        choice = choose()
        choice.save(scratch / CHOICE)
        return {"of": _subject(model), "errors": choice.errors, "plain": choice.plain, "tried": choice.tried}

    with bundle.claimed():
        about: Any = {"outdates": _OUTDATES, "about": lambda: {"hashed": model.hashed}}
        run_stage(bundle, QUANTIZE, [_subject(model), *key], [CHOICE], work, **about)
        model.take(WeightChoice.load(bundle.folder / CHOICE))
