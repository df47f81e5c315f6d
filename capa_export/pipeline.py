"""A build: calibrate, export, engines, validate. Each stage is skipped where its result is current."""

from dataclasses import replace
from math import inf

from capa_export.base.errors import CapaError
from capa_export.base.progress import say
from capa_export.bundle.store import Bundle
from capa_export.calibrate.stage import calibrate
from capa_export.config.options import BuildOptions, ValidationOptions
from capa_export.config.target import Target
from capa_export.export.in_place import Shards
from capa_export.export.stage import check_wishes, export
from capa_export.model.model import Model
from capa_export.parity.stage import validate
from capa_export.plan.device_memory import say_weights
from capa_export.plan.plan import room
from capa_export.report.schema import ParityReport
from capa_export.trt.stage import build_engines, check_engines, check_runtime

__all__ = ["build"]


def build(
    model: Model, bundle: Bundle, target: Target, options: BuildOptions, validation: ValidationOptions
) -> ParityReport:
    """Take a checkpoint all the way to validated engines.

    Raises:
        CapaError: something stands in the way of a stage, which is found before the first where it can be; or a stage
            failed, and those before it are kept.
    """
    check_runtime(target, ", or build with --target onnx")
    check_wishes(model, options)
    check_engines(model.source.dims, target, options)
    options = _with_room(model, bundle, target, options)
    with bundle.claimed():
        if options.in_place:
            with bundle.scratch() as scratch:
                Shards(model.source.checkpoint, options.precision).try_to_link(scratch)
        calibrate(model, bundle, options)
        parity = _validated(model, bundle, target, options, validation)
        if options.auto_fp32:
            parity = _with_more_in_fp32(parity, model, bundle, target, options, validation)
        return parity


def _validated(
    model: Model, bundle: Bundle, target: Target, options: BuildOptions, validation: ValidationOptions
) -> ParityReport:
    """The stages behind the calibration."""
    export(model, bundle, options)
    if target.engine is not None:
        build_engines(
            *(bundle, target),
            weights=options.weights,
            report=model.report,
            plugins=options.plugins,
            plugin_library=options.plugin_library,
        )
    return validate(model, bundle, validation)


def _with_room(model: Model, bundle: Bundle, target: Target, options: BuildOptions) -> BuildOptions:
    """Refuse what this machine, the device or the disk has no room for; settles where the engines' weights go."""
    plan = room(
        *(model.recipe, model.visual_tokens, model.source.dims, options.precision, bundle.folder),
        target=target,
        weights=options.weights,
        in_place=options.in_place,
        memory=options.memory,
        ffn=options.ffn,
        calibration=options.calibration,
        checkpoint={"files": model.fingerprints},
        layer_by_layer=options.layer_by_layer,
    )
    if plan["refusals"]:
        raise CapaError(plan["refusals"][0])
    if plan["weights"] is None:
        return options
    say_weights(options.weights, plan["weights"], plan["weights_because"])
    return replace(options, weights=plan["weights"])


def _with_more_in_fp32(
    parity: ParityReport,
    model: Model,
    bundle: Bundle,
    target: Target,
    options: BuildOptions,
    validation: ValidationOptions,
) -> ParityReport:
    """Put in FP32 what the bisection of a failure finds, until the gates hold or nothing more is found."""
    while proposed := _proposed(parity):
        model = model.with_recipe(model.recipe.with_options(fp32_layers=(*model.recipe.fp32_layers, *proposed)))
        say(f"auto-fp32     {_found(parity)}")
        before, parity = parity, _validated(model, bundle, target, options, validation)
        say(f"{'':<14}{', '.join(proposed)} in FP32: {_worst(before)} -> {_worst(parity)}")
    if not parity.passed:
        say(f"auto-fp32     nothing more to put in FP32: {_found(parity)}")
    return parity


def _proposed(parity: ParityReport) -> tuple[str, ...]:
    """The parts that the bisection of a failure would have in FP32 and that are not yet."""
    if parity.passed or parity.bisection is None:
        return ()
    return tuple(part for part in parity.bisection.fp32_layers if part not in parity.fp32_layers)


def _found(parity: ParityReport) -> str:
    return parity.bisection.sentence if parity.bisection else ""


def _worst(parity: ParityReport) -> str:
    """The verdict, and the largest error of a logit in the bundle's precision."""
    errors = [check for error in parity.export_error for check in error.checks if check.name == "relative error"]
    worst = max((inf if check.value is None else check.value for check in errors), default=0.0)
    return f"{'passed' if parity.passed else 'failed'}, relative error {worst:.1e}"
