"""The whole way from a checkpoint to a bundle, and what it would take."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from capa_export.api.bundle import AnyPath, Bundle, path_of
from capa_export.api.models import find_model, replaces_ffns
from capa_export.api.signing import signer_of
from capa_export.base.errors import CapaError, ExitCode
from capa_export.base.precision import Precision
from capa_export.base.progress import Report, say, silent
from capa_export.bundle import store
from capa_export.config.options import BuildOptions, ValidationOptions
from capa_export.config.plugins import PluginWish
from capa_export.config.schedule import Method, schedule_text
from capa_export.config.target import Target, load_target
from capa_export.config.weights import WeightsWish
from capa_export.model.model import Model
from capa_export.plan.plan import dry_run

__all__ = ["build", "plan"]

Weights = WeightsWish | Literal["in-place"]

_TUNED_ON = 12
"""Samples on which another schedule is looked for."""


def build(
    checkpoint: str | None = None,
    *,
    out: AnyPath,
    recipe: str | None = None,
    revision: str | None = None,
    schedule: str | None = None,
    ratio: float | None = None,
    min_keep_per_image: int | None = None,
    ffn_budget: float | None = None,
    images: AnyPath | None = None,
    samples: int | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    layer_by_layer: bool | None = None,
    calibration: AnyPath | None = None,
    precision: Precision = "fp16",
    quantize: str | None = None,
    quantize_head: str | None = None,
    quantize_vision: str | None = None,
    auto_precision: bool = False,
    fp32_layers: Sequence[str] | None = None,
    auto_fp32: bool = False,
    target: str = "rtx",
    weights: Weights = "auto",
    memory: int | None = None,
    kit: bool = False,
    plugins: PluginWish = "auto",
    plugin_library: AnyPath | None = None,
    validation_samples: int | None = None,
    gate: AnyPath | None = None,
    strict: bool = False,
    accept_method_loss: bool = False,
    store_golden: int = 0,
    trust_remote_code: bool = False,
    sign: AnyPath | None = None,
    command: Sequence[str] = (),
    progress: Report = silent,
) -> Bundle:
    """Take a checkpoint all the way to a validated bundle; stages that are current are not run again.

    Args:
        checkpoint: local folder or hub id; None for the recipe's own.
        out: the bundle's folder.
        recipe: a name that `capa-export models` lists, or the path of a .toml; None for the checkpoint's.
        revision: of a hub id.
        schedule: as `capa@2:0.75`, in place of the recipe's; with `/full`, visual FFNs stay as they are.
        ratio: fraction of visual tokens removed, in place of the recipe's.
        min_keep_per_image: visual tokens that each image keeps at least.
        ffn_budget: nats that scales in the place of visual FFNs may cost, in place of the recipe's.
        images: pictures and questions of calibration and validation; the recipe's scenes where there are none.
        samples: prompts of the calibration, in place of the recipe's number.
        min_pixels: least area that a picture is resized to.
        max_pixels: largest area; what the target takes by default.
        layer_by_layer: whether to hold one layer's weights in memory; None where the models do not fit.
        calibration: a finished one, a file or a bundle, in place of a run.
        precision: of weights and activations.
        quantize: what the weights of the decoder's layers are to be: `int4` or `int4:GROUP` for plain ones, scaled
            by the samples' activations, or to nearest where it ends in `/rtn`; `int8`, `fp8` and `nvfp4`, to nearest;
            `none` to expand those of a quantized checkpoint; by default what the checkpoint has.
        quantize_head: what the weight of the LM head is to be: `none`, `int8`, `int4[:GROUP]` or `fp8`.
        quantize_vision: what the weights of the vision tower's blocks are to be: `none`, `int8` or `fp8`.
        auto_precision: whether the fewest decoder layers stay as they are that bring what `quantize` costs within the
            recipe's budget.
        fp32_layers: parts in FP32, as `5.mlp`; the audit adds its own.
        auto_fp32: whether to put in FP32 what the bisection of a failure finds, and to validate again.
        target: the device, a name that `capa-export targets` lists or the path of a .toml.
        weights: where engines find theirs, and with `in-place` the ONNX files, too: in the checkpoint's own shards.
        memory: bytes of the device, where one of the target's is meant.
        kit: whether to write a kit where engines are otherwise built with the GPU that is here.
        plugins: what computes the CAPA nodes of engines.
        plugin_library: the library of native plugins.
        validation_samples: prompts to compare and questions to ask, in place of the recipe's numbers.
        gate: TOML file with bounds in place of the recipe's.
        strict: whether warnings are failures.
        accept_method_loss: whether the bundle is fit to ship however many answers the method changes.
        store_golden: samples to leave in the bundle, to validate without a checkpoint.
        trust_remote_code: whether the checkpoint's own Python may run.
        sign: file of the Ed25519 private key that signs the bundle, and a kit in it, where it is found fit to ship.
        command: a command line, for the manifest.
        progress: told how far the work is.

    Returns:
        The bundle. Gates that do not hold raise nothing: `parity.passed` says so, and `parity.fit` whether the method
        keeps the answers, too.

    Raises:
        CapaError: something stands in the way of a stage, which is found before the first where it can be; or a stage
            failed, and those before it are kept.
    """
    device = load_target(target).for_kit() if kit else load_target(target)
    bundle, signer = signer_of(store.Bundle(Path(out)), sign, exports=True)
    model = find_model(
        *(checkpoint, recipe),
        revision=revision,
        schedule=schedule,
        ratio=ratio,
        min_keep_per_image=min_keep_per_image,
        ffn_budget=ffn_budget,
        fp32_layers=fp32_layers,
        quantize=quantize,
        quantize_head=quantize_head,
        quantize_vision=quantize_vision,
        auto_precision=auto_precision,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        target=device,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    _check_device(device, precision, weights, plugins, plugin_library)
    if calibration is not None and (samples is not None or layer_by_layer is not None):
        option = "--samples" if samples is not None else "--layer-by-layer or --in-memory"
        raise CapaError(f"--calibration stands in place of a run: {option} has no effect with it", ExitCode.USAGE)
    options = BuildOptions(
        images=path_of(images),
        samples=samples,
        calibration=path_of(calibration),
        layer_by_layer=layer_by_layer,
        precision=precision,
        ffn=replaces_ffns(schedule),
        weights="external" if weights == "in-place" else weights,
        memory=memory,
        plugins=plugins,
        plugin_library=path_of(plugin_library),
        in_place=weights == "in-place",
        auto_fp32=auto_fp32,
        command=command,
    )
    validation = ValidationOptions(
        images=options.images,
        layer_by_layer=layer_by_layer,
        samples=validation_samples,
        gate=path_of(gate),
        strict=strict,
        accept_method_loss=accept_method_loss,
        bisect=auto_fp32,
        store_golden=store_golden,
    )
    from capa_export import pipeline

    parity = pipeline.build(model, bundle, device, options, validation)
    if signer is not None:
        signer.sign(fit=parity.fit)
    if parity.passed and not parity.fit:
        _say_alternative(model, options, Path(out))
    return Bundle(out)


def _say_alternative(model: Model, options: BuildOptions, out: Path) -> None:
    """Name the schedule that `tune` would take for what the bundle's own costs, where that changes too many answers."""
    from tempfile import TemporaryDirectory

    from capa_export.study.tune.stage import tune

    own = Method(schedule_text(model.schedule), model.schedule, "scale" if options.ffn else "full")
    options = replace(options, ffn=True, calibration=out if options.ffn else None, samples=_TUNED_ON)
    say(f"{'tune':<14}the method changes too many answers; looking for another that costs no more")
    try:
        with TemporaryDirectory() as scratch:
            _, tuning = tune(model, store.Bundle(Path(scratch)), options, own)
    except CapaError as error:
        say(f"{'':<14}{error}")
        return
    best = next(row for row in tuning.finalists if row.method == tuning.chosen)
    say(f"{'':<14}{tuning.verdict}")
    say(f"{'':<14}--schedule {tuning.chosen}: KL {best.kl:.3g} nats from dense, first tokens as dense {best.top1:.0%}")


def plan(
    checkpoint: str | None = None,
    *,
    out: AnyPath | None = None,
    recipe: str | None = None,
    revision: str | None = None,
    schedule: str | None = None,
    ratio: float | None = None,
    min_keep_per_image: int | None = None,
    ffn_budget: float | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    layer_by_layer: bool | None = None,
    calibration: AnyPath | None = None,
    precision: Precision = "fp16",
    quantize: str | None = None,
    quantize_head: str | None = None,
    quantize_vision: str | None = None,
    auto_precision: bool = False,
    fp32_layers: Sequence[str] | None = None,
    target: str = "rtx",
    weights: Weights = "auto",
    memory: int | None = None,
) -> dict[str, Any]:
    """Say what a build would do, from `config.json` alone: FLOPs, sizes, memory, and what would end it (`refusals`).

    Args:
        checkpoint: as `build`, like all the others.
        out: the bundle's folder, whose calibration says which layers are linear.
        recipe: a name or a path.
        revision: of a hub id.
        schedule: as `capa@2:0.75`, in place of the recipe's; with `/full`, visual FFNs stay as they are.
        ratio: fraction of visual tokens removed.
        min_keep_per_image: visual tokens that each image keeps at least.
        ffn_budget: nats that scales in the place of visual FFNs may cost, in place of the recipe's.
        min_pixels: least area that a picture is resized to.
        max_pixels: largest area.
        layer_by_layer: whether to hold one layer's weights in memory.
        calibration: a finished one.
        precision: of weights and activations.
        quantize: what the weights of the decoder's layers are to be.
        quantize_head: what the weight of the LM head is to be: `none`, `int8`, `int4[:GROUP]` or `fp8`.
        quantize_vision: what the weights of the vision tower's blocks are to be: `none`, `int8` or `fp8`.
        auto_precision: whether the fewest decoder layers stay as they are that bring what `quantize` costs within the
            recipe's budget.
        fp32_layers: parts in FP32.
        target: the device.
        weights: where engines find theirs.
        memory: bytes of the device.

    Raises:
        CapaError: the config cannot be read, or an option does not fit the model.
    """
    device = load_target(target)
    model = find_model(
        *(checkpoint, recipe),
        revision=revision,
        schedule=schedule,
        ratio=ratio,
        min_keep_per_image=min_keep_per_image,
        ffn_budget=ffn_budget,
        fp32_layers=fp32_layers,
        quantize=quantize,
        quantize_head=quantize_head,
        quantize_vision=quantize_vision,
        auto_precision=auto_precision,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        target=device,
    )
    _check_device(device, precision, weights)
    return dry_run(
        *(model.recipe, model.checkpoint, path_of(out), precision),
        ffn=replaces_ffns(schedule),
        revision=revision,
        calibration=path_of(calibration),
        target=device,
        weights="external" if weights == "in-place" else weights,
        in_place=weights == "in-place",
        memory=memory,
        layer_by_layer=layer_by_layer,
    )


def _check_device(
    device: Target,
    precision: Precision,
    weights: Weights,
    plugins: PluginWish = "auto",
    plugin_library: AnyPath | None = None,
) -> None:
    """Refuse options that a target's engines, or the lack of any, cannot take."""
    device.require_precision(precision)
    if device.engine:
        device.require_engine()
    elif weights in ("joined", "external"):
        raise CapaError(f"--weights {weights}: target {device.name} has no engine to share them", ExitCode.USAGE)
    elif plugins != "auto" or plugin_library is not None:
        raise CapaError(f"--plugins: target {device.name} has no engine to put them in", ExitCode.USAGE)
