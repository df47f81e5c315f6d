"""The commands that take a checkpoint all the way, or say what that would take."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from capa_export.base.errors import CapaError, ExitCode
from capa_export.cli.arguments import check_places, one_checkpoint, with_schedule, words
from capa_export.cli.options import (
    OUTPUT,
    VALIDATION,
    AcceptMethodLossOpt,
    AutoPrecisionOpt,
    BuildWeightsOpt,
    CalibrationOpt,
    CheckpointOpt,
    FfnBudgetOpt,
    FfnOpt,
    Fp32LayersOpt,
    GateOpt,
    ImagesOpt,
    JsonOpt,
    JunitOpt,
    KitOpt,
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
    QuantizeHeadOpt,
    QuantizeOpt,
    QuantizeVisionOpt,
    RatioOpt,
    RevisionOpt,
    SamplesOpt,
    ScheduleOpt,
    SelectorOpt,
    SignOpt,
    SourceArg,
    StoreGoldenOpt,
    StrictOpt,
    TargetOpt,
    TrustOpt,
    ValidationSamplesOpt,
)
from capa_export.cli.results import finish, print_json

__all__ = ["build", "plan"]


def build(
    source: SourceArg = None,
    model: ModelOpt = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Bundle folder; not needed with --dry-run.", rich_help_panel=OUTPUT),
    ] = None,
    checkpoint: CheckpointOpt = None,
    revision: RevisionOpt = None,
    schedule: ScheduleOpt = None,
    ratio: RatioOpt = None,
    prune_layer: LayerOpt = None,
    selector: SelectorOpt = None,
    min_keep_per_image: MinKeepOpt = None,
    ffn_budget: FfnBudgetOpt = None,
    ffn: FfnOpt = None,
    images: ImagesOpt = None,
    samples: SamplesOpt = None,
    min_pixels: MinPixelsOpt = None,
    max_pixels: MaxPixelsOpt = None,
    layer_by_layer: LayerByLayerOpt = None,
    calibration: CalibrationOpt = None,
    precision: PrecisionOpt = "fp16",
    quantize: QuantizeOpt = None,
    quantize_head: QuantizeHeadOpt = None,
    quantize_vision: QuantizeVisionOpt = None,
    auto_precision: AutoPrecisionOpt = False,
    fp32_layers: Fp32LayersOpt = None,
    auto_fp32: Annotated[
        bool,
        typer.Option(
            "--auto-fp32",
            help="Where the gates fail, do what --bisect proposes, and validate again.",
            rich_help_panel=VALIDATION,
        ),
    ] = False,
    target: TargetOpt = "rtx",
    weights: BuildWeightsOpt = "auto",
    memory: MemoryOpt = None,
    kit: KitOpt = False,
    plugins: PluginsOpt = "auto",
    plugin_library: PluginLibraryOpt = None,
    validation_samples: ValidationSamplesOpt = None,
    gate: GateOpt = None,
    strict: StrictOpt = False,
    accept_method_loss: AcceptMethodLossOpt = False,
    store_golden: StoreGoldenOpt = 0,
    sign: SignOpt = None,
    junit: JunitOpt = None,
    markdown: MarkdownOpt = None,
    trust_remote_code: TrustOpt = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and stop: FLOPs, sizes, memory.", rich_help_panel=OUTPUT)
    ] = False,
    as_json: JsonOpt = False,
) -> None:
    """Checkpoint in, validated bundle out: all stages in order."""
    from capa_export.api import builds
    from capa_export.base.progress import progress

    source = one_checkpoint(source, checkpoint)
    schedule, ratio = with_schedule(source, model, revision, schedule, ratio, prune_layer, selector, ffn)
    asked: dict[str, Any] = {
        "recipe": model,
        "revision": revision,
        "schedule": schedule,
        "ratio": ratio,
        "min_keep_per_image": min_keep_per_image,
        "ffn_budget": ffn_budget,
        "fp32_layers": words(fp32_layers),
        "min_pixels": min_pixels,
        "max_pixels": max_pixels,
        "calibration": calibration,
        "precision": precision,
        "quantize": quantize,
        "quantize_head": quantize_head,
        "quantize_vision": quantize_vision,
        "auto_precision": auto_precision,
        "target": target,
        "weights": weights,
        "memory": memory,
        "layer_by_layer": layer_by_layer,
    }
    if dry_run:
        _print_plan(builds.plan(source, out=out, **asked), as_json=as_json)
        return
    if out is None:
        raise CapaError("build needs --out FOLDER; only --dry-run does without", ExitCode.USAGE)
    check_places(junit, markdown)
    with progress() as report:
        bundle = builds.build(
            source,
            out=out,
            **asked,
            images=images,
            samples=samples,
            auto_fp32=auto_fp32,
            kit=kit,
            plugins=plugins,
            plugin_library=plugin_library,
            validation_samples=validation_samples,
            gate=gate,
            strict=strict,
            accept_method_loss=accept_method_loss,
            store_golden=store_golden,
            trust_remote_code=trust_remote_code,
            sign=sign,
            command=sys.argv[1:],
            progress=report,
        )
    engine = next((name for name in bundle.manifest["stages"] if name == f"engine/{Path(target).stem}"), None)
    if engine and not as_json:
        from capa_export.report.terminal import print_engines

        print_engines(bundle.manifest["stages"][engine]["result"])
    finish(bundle, bundle.parity, junit=junit, markdown=markdown, as_json=as_json)


def plan(
    source: SourceArg = None,
    model: ModelOpt = None,
    checkpoint: CheckpointOpt = None,
    schedule: ScheduleOpt = None,
    ratio: RatioOpt = None,
    prune_layer: LayerOpt = None,
    selector: SelectorOpt = None,
    min_keep_per_image: MinKeepOpt = None,
    ffn_budget: FfnBudgetOpt = None,
    ffn: FfnOpt = None,
    min_pixels: MinPixelsOpt = None,
    max_pixels: MaxPixelsOpt = None,
    precision: PrecisionOpt = "fp16",
    quantize: QuantizeOpt = None,
    quantize_head: QuantizeHeadOpt = None,
    quantize_vision: QuantizeVisionOpt = None,
    auto_precision: AutoPrecisionOpt = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Bundle whose calibration says which layers are linear.", rich_help_panel=OUTPUT
        ),
    ] = None,
    target: TargetOpt = "rtx",
    weights: BuildWeightsOpt = "auto",
    memory: MemoryOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Say what a build would do, as `build --dry-run`. Exit code 3: it would be refused."""
    build(
        source=source,
        model=model,
        out=out,
        checkpoint=checkpoint,
        schedule=schedule,
        ratio=ratio,
        prune_layer=prune_layer,
        selector=selector,
        min_keep_per_image=min_keep_per_image,
        ffn_budget=ffn_budget,
        ffn=ffn,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        precision=precision,
        quantize=quantize,
        quantize_head=quantize_head,
        quantize_vision=quantize_vision,
        auto_precision=auto_precision,
        target=target,
        weights=weights,
        memory=memory,
        dry_run=True,
        as_json=as_json,
    )


def _print_plan(plan: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(plan)
    else:
        from capa_export.report.terminal import print_plan

        print_plan(plan)
    if plan["refusals"]:
        raise CapaError(f"a build would be refused: {plan['refusals'][0]}")
