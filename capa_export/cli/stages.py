"""The commands that run one stage each."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from capa_export.base.errors import CapaError, ExitCode
from capa_export.cli.arguments import check_places, one_checkpoint, with_schedule, words
from capa_export.cli.options import (
    CALIBRATION,
    ENGINE,
    OUTPUT,
    VALIDATION,
    AcceptMethodLossOpt,
    AutoPrecisionOpt,
    BisectOpt,
    BundleArg,
    CalibrationOpt,
    CheckpointOpt,
    EngineOpt,
    ExportWeightsOpt,
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
    MinKeepOpt,
    MinPixelsOpt,
    ModelOpt,
    OutOpt,
    PluginLibraryOpt,
    PluginsOpt,
    PrecisionOpt,
    ProviderOpt,
    QuantizeHeadOpt,
    QuantizeOpt,
    QuantizeVisionOpt,
    RatioOpt,
    RayOpt,
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
    VerifyKeyOpt,
    WeightsOpt,
    WorkersOpt,
)
from capa_export.cli.results import finish, print_json

__all__ = ["calibrate", "engine", "export", "validate"]


def calibrate(
    out: OutOpt,
    model: ModelOpt = None,
    checkpoint: CheckpointOpt = None,
    revision: RevisionOpt = None,
    ffn_budget: FfnBudgetOpt = None,
    quantize: QuantizeOpt = None,
    quantize_head: QuantizeHeadOpt = None,
    quantize_vision: QuantizeVisionOpt = None,
    auto_precision: AutoPrecisionOpt = False,
    images: ImagesOpt = None,
    samples: SamplesOpt = None,
    min_pixels: MinPixelsOpt = None,
    max_pixels: MaxPixelsOpt = None,
    layer_by_layer: LayerByLayerOpt = None,
    workers: WorkersOpt = None,
    ray: RayOpt = None,
    trust_remote_code: TrustOpt = False,
    merge: Annotated[
        bool,
        typer.Option(
            "--merge", help="Add up finished calibrations instead of running one.", rich_help_panel=CALIBRATION
        ),
    ] = False,
    parts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CHECKPOINT",
            help="Local folder or hub id; its config.json says which recipe is for it. With --merge: calibration files "
            "or bundle folders.",
        ),
    ] = None,
    as_json: JsonOpt = False,
) -> None:
    """Measure which visual FFNs are linear, and their scales."""
    if merge:
        chosen = (images, samples, checkpoint, revision, workers, ray, min_pixels, max_pixels, ffn_budget, quantize)
        chosen += (quantize_head, quantize_vision, auto_precision)
        if not parts or any(chosen) or layer_by_layer is not None:
            raise CapaError(
                "--merge takes calibrations as arguments, and nothing else but --out and --model", ExitCode.USAGE
            )
        summary = _merged([Path(part) for part in parts], out, model)
    else:
        if parts and len(parts) > 1:
            raise CapaError("calibrate takes one checkpoint; several calibrations are for --merge", ExitCode.USAGE)
        from capa_export.api import stages
        from capa_export.base.progress import progress

        with progress() as report:
            summary = stages.calibrate(
                one_checkpoint(parts[0] if parts else None, checkpoint),
                out=out,
                recipe=model,
                revision=revision,
                ffn_budget=ffn_budget,
                quantize=quantize,
                quantize_head=quantize_head,
                quantize_vision=quantize_vision,
                auto_precision=auto_precision,
                images=images,
                samples=samples,
                min_pixels=min_pixels,
                max_pixels=max_pixels,
                layer_by_layer=layer_by_layer,
                workers=workers,
                ray=ray,
                trust_remote_code=trust_remote_code,
                progress=report,
            )
    if as_json:
        print_json(summary)
    else:
        from capa_export.report.terminal import print_calibration

        print_calibration(summary)


def _merged(parts: list[Path], out: Path, recipe: str | None) -> dict[str, Any]:
    """Put the sum of finished calibrations into a bundle; returns its summary."""
    from capa_export.bundle.store import Bundle
    from capa_export.calibrate.stage import adopt_calibration
    from capa_export.calibrate.sums import Calibration, merged
    from capa_export.config.recipe import FFN, load_recipe

    for part in parts:
        if _chosen_by_samples(part):
            raise CapaError(
                f"{part}: its weights were chosen by samples, so that it fits no other machine's; calibrate each with "
                "--quantize int4/rtn, without --auto-precision, to add them up"
            )
    calibration = merged([Calibration.load(part) for part in parts])
    adopt_calibration(Bundle(out), calibration)
    return calibration.summary(load_recipe(recipe).ffn if recipe else FFN())


def _chosen_by_samples(calibration: Path) -> bool:
    """Whether samples decided the weights that a calibration, in a bundle or a file of its own, is of."""
    from capa_export.bundle.store import MANIFEST, Bundle
    from capa_export.calibrate.sums import ROUNDING
    from capa_export.config.quantization import looks_at_samples
    from capa_export.model.quantized.choice import CHOICE

    folder = calibration if calibration.is_dir() else calibration.parent
    if (folder / MANIFEST).is_file():
        stage = Bundle(folder).manifest["stages"].get("calibrate", {})
        if (asked := stage.get("result", {}).get(ROUNDING)) is not None:
            return looks_at_samples(asked["quantize"]) or asked["budget"] is not None
    return (folder / CHOICE).exists()


def export(
    out: OutOpt,
    source: SourceArg = None,
    model: ModelOpt = None,
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
    calibration: CalibrationOpt = None,
    precision: PrecisionOpt = "fp16",
    quantize: QuantizeOpt = None,
    quantize_head: QuantizeHeadOpt = None,
    quantize_vision: QuantizeVisionOpt = None,
    auto_precision: AutoPrecisionOpt = False,
    fp32_layers: Fp32LayersOpt = None,
    min_pixels: MinPixelsOpt = None,
    max_pixels: MaxPixelsOpt = None,
    weights: ExportWeightsOpt = "copied",
    polygraphy: Annotated[
        bool,
        typer.Option(
            "--polygraphy",
            help="Leave inputs and outputs of one prompt for Polygraphy, and its commands.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    trust_remote_code: TrustOpt = False,
    sign: SignOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Write the ONNX files of a calibrated bundle."""
    from capa_export.api import stages
    from capa_export.base.progress import progress

    source = one_checkpoint(source, checkpoint)
    schedule, ratio = with_schedule(source, model, revision, schedule, ratio, prune_layer, selector, ffn)
    with progress() as report:
        bundle = stages.export(
            source,
            out=out,
            recipe=model,
            revision=revision,
            schedule=schedule,
            ratio=ratio,
            min_keep_per_image=min_keep_per_image,
            ffn_budget=ffn_budget,
            images=images,
            calibration=calibration,
            precision=precision,
            quantize=quantize,
            quantize_head=quantize_head,
            quantize_vision=quantize_vision,
            auto_precision=auto_precision,
            fp32_layers=words(fp32_layers),
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            in_place=weights == "in-place",
            polygraphy=polygraphy,
            trust_remote_code=trust_remote_code,
            sign=sign,
            command=sys.argv[1:],
            progress=report,
        )
    if as_json:
        print_json(bundle.manifest["stages"]["export"])


def engine(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder; with --on-device, a kit.")],
    target: TargetOpt = "rtx",
    weights: WeightsOpt = "auto",
    kit: KitOpt = False,
    plugins: PluginsOpt = "auto",
    plugin_library: PluginLibraryOpt = None,
    on_device: Annotated[
        bool,
        typer.Option(
            "--on-device",
            help="Build the engines of a kit, on its device, as its build.sh does.",
            rich_help_panel=ENGINE,
        ),
    ] = False,
    tensorrt_include: Annotated[
        Path | None,
        typer.Option(
            help="With --on-device: folder of TensorRT's headers [default: the usual places].", rich_help_panel=ENGINE
        ),
    ] = None,
    verify_key: VerifyKeyOpt = None,
    sign: SignOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Build a bundle's TensorRT engines, or a kit that builds them. A kit is for the device itself to run."""
    from capa_export.base.progress import progress
    from capa_export.report.terminal import print_engines

    if on_device:
        if (target, weights, kit, plugins, plugin_library) != ("rtx", "auto", False, "auto", None):
            raise CapaError("--on-device: the kit says target, weights and plugins; give none of them", ExitCode.USAGE)
        from capa_export.api.kits import build_kit

        asked: dict[str, Any] = {"tensorrt_include": tensorrt_include, "verify_key": verify_key, "sign": sign}
        with progress() as report:
            result = build_kit(bundle, **asked, progress=report)
    else:
        if tensorrt_include is not None:
            raise CapaError("--tensorrt-include is for --on-device", ExitCode.USAGE)
        from capa_export.api.bundle import Bundle

        with progress() as report:
            result = Bundle(bundle, verify_key=verify_key).build_engines(
                target,
                weights=weights,
                kit=kit,
                plugins=plugins,
                plugin_library=plugin_library,
                sign=sign,
                progress=report,
            )
    if as_json:
        print_json(result)
    else:
        print_engines(result)


def validate(
    bundle: BundleArg,
    checkpoint: CheckpointOpt = None,
    revision: RevisionOpt = None,
    images: ImagesOpt = None,
    samples: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Prompts to compare and questions to ask [default: the recipe's numbers].",
            rich_help_panel=VALIDATION,
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Draw other samples than the usual ones.", rich_help_panel=VALIDATION)
    ] = None,
    layer_by_layer: LayerByLayerOpt = None,
    min_pixels: MinPixelsOpt = None,
    max_pixels: MaxPixelsOpt = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Recipe whose gates and bounds hold: a name from `models`, or the path of a .toml [default: the "
            "shipped one of the bundle's recipe; else the bundle's own, which the report says].",
            rich_help_panel=VALIDATION,
        ),
    ] = None,
    gate: GateOpt = None,
    strict: StrictOpt = False,
    accept_method_loss: AcceptMethodLossOpt = False,
    bisect: BisectOpt = False,
    store_golden: StoreGoldenOpt = 0,
    verify_key: VerifyKeyOpt = None,
    sign: SignOpt = None,
    engine: EngineOpt = None,
    provider: ProviderOpt = "cpu",
    junit: JunitOpt = None,
    markdown: MarkdownOpt = None,
    trust_remote_code: TrustOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Hold a bundle against the eager model, or its golden samples. Exit code 6: they differ; 7: the method's loss."""
    from capa_export.api.bundle import Bundle
    from capa_export.base.progress import progress

    opened = Bundle(bundle, verify_key=verify_key)
    check_places(junit, markdown)
    with progress() as report:
        parity = opened.validate(
            checkpoint=checkpoint,
            revision=revision,
            images=images,
            samples=samples,
            seed=seed,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            layer_by_layer=layer_by_layer,
            recipe=model,
            gate=gate,
            strict=strict,
            accept_method_loss=accept_method_loss,
            bisect=bisect,
            store_golden=store_golden,
            engine=engine,
            provider=provider,
            trust_remote_code=trust_remote_code,
            sign=sign,
            progress=report,
        )
    finish(opened, parity, junit=junit, markdown=markdown, as_json=as_json)
