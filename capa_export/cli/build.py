"""The commands that take a checkpoint all the way, or say what that would take."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from capa_export.base.errors import CapaError, ExitCode
from capa_export.cli.options import (
    BuildWeightsOpt,
    CalibrationOpt,
    CheckpointOpt,
    FfnOpt,
    Fp32LayersOpt,
    GateOpt,
    ImagesOpt,
    JsonOpt,
    JunitOpt,
    LayerByLayerOpt,
    LayerOpt,
    MarkdownOpt,
    MaxPixelsOpt,
    MemoryOpt,
    MinKeepOpt,
    MinPixelsOpt,
    ModelOpt,
    PluginLibraryOpt,
    PluginsOpt,
    PrecisionOpt,
    RatioOpt,
    RevisionOpt,
    SamplesOpt,
    SelectorOpt,
    SourceArg,
    StoreGoldenOpt,
    StrictOpt,
    TargetOpt,
    TrustOpt,
    ValidationSamplesOpt,
)
from capa_export.cli.show import print_json
from capa_export.cli.stages import check_places, finish, recipe_and_checkpoint, with_options

if TYPE_CHECKING:
    from capa_export.config.recipe import Recipe

__all__ = ["build", "plan"]


def build(
    source: SourceArg = None,
    model: ModelOpt = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Bundle folder; not needed with --dry-run.")] = None,
    checkpoint: CheckpointOpt = None,
    revision: RevisionOpt = None,
    ratio: RatioOpt = None,
    prune_layer: LayerOpt = None,
    selector: SelectorOpt = None,
    min_keep_per_image: MinKeepOpt = None,
    ffn: FfnOpt = True,
    images: ImagesOpt = None,
    samples: SamplesOpt = None,
    min_pixels: MinPixelsOpt = None,
    max_pixels: MaxPixelsOpt = None,
    layer_by_layer: LayerByLayerOpt = None,
    calibration: CalibrationOpt = None,
    precision: PrecisionOpt = "fp16",
    fp32_layers: Fp32LayersOpt = None,
    auto_fp32: Annotated[
        bool, typer.Option("--auto-fp32", help="Where the gates fail, do what --bisect proposes, and validate again.")
    ] = False,
    target: TargetOpt = "rtx",
    weights: BuildWeightsOpt = "auto",
    memory: MemoryOpt = None,
    plugins: PluginsOpt = "auto",
    plugin_library: PluginLibraryOpt = None,
    validation_samples: ValidationSamplesOpt = None,
    gate: GateOpt = None,
    strict: StrictOpt = False,
    store_golden: StoreGoldenOpt = 0,
    junit: JunitOpt = None,
    markdown: MarkdownOpt = None,
    trust_remote_code: TrustOpt = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop: FLOPs, sizes, memory.")] = False,
    as_json: JsonOpt = False,
) -> None:
    """Checkpoint in, validated bundle out: all stages in order."""
    from capa_export.config.target import load_target

    recipe, checkpoint = recipe_and_checkpoint(source, model, checkpoint, revision)
    device = load_target(target)
    recipe = with_options(
        *(recipe, ratio, prune_layer, selector, min_keep_per_image, fp32_layers),
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        target=device,
    )
    device.require_precision(precision)
    if device.engine:
        device.require_engine()
    elif weights == "external":
        raise CapaError(f"--weights external: target {device.name} has no engine to share them", ExitCode.USAGE)
    if not device.engine and (plugins != "auto" or plugin_library is not None):
        raise CapaError(f"--plugins: target {device.name} has no engine to put them in", ExitCode.USAGE)
    if calibration is not None and (samples is not None or layer_by_layer is not None):
        option = "--samples" if samples is not None else "--layer-by-layer or --in-memory"
        raise CapaError(f"--calibration stands in place of a run: {option} has no effect with it", ExitCode.USAGE)
    wish = "external" if weights == "in-place" else weights
    if dry_run:
        _print_plan(
            recipe,
            checkpoint,
            out,
            precision,
            ffn=ffn,
            revision=revision,
            calibration=calibration,
            target=device,
            weights=wish,
            in_place=weights == "in-place",
            memory=memory,
            layer_by_layer=layer_by_layer,
            as_json=as_json,
        )
        return
    if out is None:
        raise CapaError("build needs --out FOLDER; only --dry-run does without", ExitCode.USAGE)
    from capa_export import pipeline
    from capa_export.base.progress import progress
    from capa_export.bundle.store import Bundle
    from capa_export.job import Job
    from capa_export.parity.validation import Wanted

    check_places(junit, markdown)
    wanted = Wanted(samples=validation_samples, gate=gate, strict=strict, bisect=auto_fp32, store_golden=store_golden)
    with progress() as report:
        job = Job(
            recipe=recipe,
            bundle=Bundle(out),
            checkpoint=checkpoint,
            revision=revision,
            images=images,
            samples=samples,
            layer_by_layer=layer_by_layer,
            calibration=calibration,
            precision=precision,
            ffn=ffn,
            weights=wish,
            memory=memory,
            in_place=weights == "in-place",
            plugins=plugins,
            plugin_library=plugin_library,
            trust_remote_code=trust_remote_code,
            command=sys.argv[1:],
            report=report,
        )
        parity = pipeline.build(job, device, wanted, auto_fp32=auto_fp32)
    if device.engine and not as_json:
        from capa_export.report.terminal import engine_table

        engine_table(job.bundle.stage(f"engine/{device.name}")["result"])
    finish(job.bundle, parity, junit=junit, markdown=markdown, as_json=as_json)


def plan(
    source: SourceArg = None,
    model: ModelOpt = None,
    checkpoint: CheckpointOpt = None,
    ratio: RatioOpt = None,
    prune_layer: LayerOpt = None,
    selector: SelectorOpt = None,
    min_keep_per_image: MinKeepOpt = None,
    ffn: FfnOpt = True,
    min_pixels: MinPixelsOpt = None,
    max_pixels: MaxPixelsOpt = None,
    precision: PrecisionOpt = "fp16",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Bundle whose calibration says which layers are linear.")
    ] = None,
    target: TargetOpt = "rtx",
    weights: BuildWeightsOpt = "auto",
    memory: MemoryOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Say what a build would do, as `build --dry-run` (exit code 3: it would be refused)."""
    build(
        source=source,
        model=model,
        out=out,
        checkpoint=checkpoint,
        ratio=ratio,
        prune_layer=prune_layer,
        selector=selector,
        min_keep_per_image=min_keep_per_image,
        ffn=ffn,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        precision=precision,
        target=target,
        weights=weights,
        memory=memory,
        dry_run=True,
        as_json=as_json,
    )


def _print_plan(
    recipe: "Recipe", checkpoint: str, out: Path | None, precision: str, *, as_json: bool, **options: Any
) -> None:
    from capa_export.plan.plan import dry_run

    result = dry_run(recipe, checkpoint, out, precision, **options)
    if as_json:
        print_json(result)
    else:
        from capa_export.report.terminal import plan_table

        plan_table(result)
    if result["refusals"]:
        raise CapaError(f"a build would be refused: {result['refusals'][0]}")
