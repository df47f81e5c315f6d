"""The commands that run one stage each."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from capa_export.base.errors import CapaError, ExitCode
from capa_export.cli.options import (
    BisectOpt,
    BundleArg,
    CalibrationOpt,
    CheckpointOpt,
    EngineOpt,
    ExportWeightsOpt,
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
    MinKeepOpt,
    MinPixelsOpt,
    ModelOpt,
    OutOpt,
    PluginLibraryOpt,
    PluginsOpt,
    PrecisionOpt,
    RatioOpt,
    RayOpt,
    RevisionOpt,
    SamplesOpt,
    SelectorOpt,
    SourceArg,
    StoreGoldenOpt,
    StrictOpt,
    TargetOpt,
    TrustOpt,
    WeightsOpt,
    WorkersOpt,
)
from capa_export.cli.show import print_json

if TYPE_CHECKING:
    from capa_export.bundle.store import Bundle
    from capa_export.config.recipe import Recipe
    from capa_export.config.target import Target
    from capa_export.report.schema import ParityReport

__all__ = [
    "calibrate",
    "check_places",
    "engine",
    "export",
    "finish",
    "recipe_and_checkpoint",
    "validate",
    "with_options",
]


def calibrate(
    out: OutOpt,
    model: ModelOpt = None,
    checkpoint: CheckpointOpt = None,
    revision: RevisionOpt = None,
    images: ImagesOpt = None,
    samples: SamplesOpt = None,
    min_pixels: MinPixelsOpt = None,
    max_pixels: MaxPixelsOpt = None,
    layer_by_layer: LayerByLayerOpt = None,
    workers: WorkersOpt = None,
    ray: RayOpt = None,
    trust_remote_code: TrustOpt = False,
    merge: Annotated[
        bool, typer.Option("--merge", help="Add up finished calibrations instead of running one.")
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
    from capa_export import pipeline
    from capa_export.base.progress import progress
    from capa_export.base.workers import Workers
    from capa_export.bundle.store import Bundle
    from capa_export.calibrate.sums import Calibration, merged
    from capa_export.config.recipe import FFN, load_recipe
    from capa_export.job import Job

    if merge:
        chosen = (images, samples, checkpoint, revision, workers, ray, min_pixels, max_pixels)
        if not parts or any(chosen) or layer_by_layer is not None:
            raise CapaError(
                "--merge takes calibrations as arguments, and nothing else but --out and --model", ExitCode.USAGE
            )
        calibration = merged([Calibration.load(Path(part)) for part in parts])
        pipeline.adopt_calibration(Bundle(out), calibration)
        ffn = load_recipe(model).ffn if model else FFN()
    else:
        if parts and len(parts) > 1:
            raise CapaError("calibrate takes one checkpoint; several calibrations are for --merge", ExitCode.USAGE)
        recipe, checkpoint = recipe_and_checkpoint(parts[0] if parts else None, model, checkpoint, revision)
        recipe = with_options(recipe, min_pixels=min_pixels, max_pixels=max_pixels)
        with progress() as report:
            job = Job(
                recipe=recipe,
                bundle=Bundle(out),
                checkpoint=checkpoint,
                revision=revision,
                images=images,
                samples=samples,
                layer_by_layer=layer_by_layer,
                workers=Workers(count=workers, ray=ray),
                trust_remote_code=trust_remote_code,
                report=report,
            )
            calibration = pipeline.calibrate(job)
        ffn = recipe.ffn
    summary = calibration.summary(ffn.eta, ffn.paper_layers)
    if as_json:
        print_json(summary)
    else:
        from capa_export.report.terminal import calibration_table

        calibration_table(summary)


def export(
    out: OutOpt,
    source: SourceArg = None,
    model: ModelOpt = None,
    checkpoint: CheckpointOpt = None,
    revision: RevisionOpt = None,
    ratio: RatioOpt = None,
    prune_layer: LayerOpt = None,
    selector: SelectorOpt = None,
    min_keep_per_image: MinKeepOpt = None,
    ffn: FfnOpt = True,
    calibration: CalibrationOpt = None,
    precision: PrecisionOpt = "fp16",
    fp32_layers: Fp32LayersOpt = None,
    min_pixels: MinPixelsOpt = None,
    max_pixels: MaxPixelsOpt = None,
    weights: ExportWeightsOpt = "copied",
    trust_remote_code: TrustOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Write the ONNX files of a calibrated bundle."""
    from capa_export import pipeline
    from capa_export.base.progress import progress
    from capa_export.bundle.store import Bundle
    from capa_export.job import Job

    recipe, checkpoint = recipe_and_checkpoint(source, model, checkpoint, revision)
    recipe = with_options(
        *(recipe, ratio, prune_layer, selector, min_keep_per_image, fp32_layers),
        min_pixels=min_pixels,
        max_pixels=max_pixels,
    )
    bundle = Bundle(out)
    with progress() as report:
        job = Job(
            recipe=recipe,
            bundle=bundle,
            checkpoint=checkpoint,
            revision=revision,
            calibration=calibration,
            precision=precision,
            ffn=ffn,
            in_place=weights == "in-place",
            trust_remote_code=trust_remote_code,
            command=sys.argv[1:],
            report=report,
        )
        if calibration is not None:
            pipeline.calibrate(job)
        pipeline.export(job)
    if as_json:
        print_json(bundle.stage("export"))


def engine(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder; with --on-device, a kit.")],
    target: TargetOpt = "rtx",
    weights: WeightsOpt = "auto",
    plugins: PluginsOpt = "auto",
    plugin_library: PluginLibraryOpt = None,
    on_device: Annotated[
        bool, typer.Option("--on-device", help="Build the engines of a kit, on its device, as its build.sh does.")
    ] = False,
    tensorrt_include: Annotated[
        Path | None, typer.Option(help="With --on-device: folder of TensorRT's headers [default: the usual places].")
    ] = None,
    as_json: JsonOpt = False,
) -> None:
    """Build a bundle's TensorRT engines, or the kit that builds them on the device."""
    from capa_export.base.progress import progress
    from capa_export.report.terminal import engine_table

    if on_device:
        if (target, weights, plugins, plugin_library) != ("rtx", "auto", "auto", None):
            raise CapaError("--on-device: the kit says target, weights and plugins; give none of them", ExitCode.USAGE)
        from capa_export.trt.kit import build_kit

        with progress() as report:
            result: dict[str, Any] = build_kit(bundle, tensorrt_include=tensorrt_include, report=report)
    else:
        if tensorrt_include is not None:
            raise CapaError("--tensorrt-include is for --on-device", ExitCode.USAGE)
        from capa_export.bundle.store import Bundle
        from capa_export.config.target import load_target
        from capa_export.trt.stage import build_engines

        device = load_target(target)
        with progress() as report:
            result = build_engines(
                Bundle.open(bundle),
                device,
                weights=weights,
                report=report,
                plugins=plugins,
                plugin_library=plugin_library,
            )
    if as_json:
        print_json(result)
    else:
        engine_table(result)


def validate(
    bundle: BundleArg,
    checkpoint: CheckpointOpt = None,
    revision: RevisionOpt = None,
    images: ImagesOpt = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Prompts to compare and questions to ask [default: the recipe's numbers].")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Draw other samples than the usual ones.")] = None,
    layer_by_layer: LayerByLayerOpt = None,
    min_pixels: MinPixelsOpt = None,
    max_pixels: MaxPixelsOpt = None,
    gate: GateOpt = None,
    strict: StrictOpt = False,
    bisect: BisectOpt = False,
    store_golden: StoreGoldenOpt = 0,
    engine: EngineOpt = None,
    junit: JunitOpt = None,
    markdown: MarkdownOpt = None,
    trust_remote_code: TrustOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Hold a bundle against the eager model, or its golden samples if it has some (exit code 6: parity)."""
    from capa_export import pipeline
    from capa_export.base.progress import progress
    from capa_export.bundle.store import Bundle
    from capa_export.job import Job
    from capa_export.parity.against_golden import GOLDEN
    from capa_export.parity.validation import Wanted
    from capa_export.run.bundled import bundled_bounds

    opened = Bundle.open(bundle)
    check_places(junit, markdown)
    given = (checkpoint, revision, images, samples, seed, min_pixels, max_pixels)
    live = bisect or store_golden or any(option is not None for option in given)
    wanted = Wanted(
        engine=engine,
        golden=not live and GOLDEN in opened.manifest["stages"],
        samples=samples,
        seed=seed,
        gate=gate,
        strict=strict,
        bisect=bisect,
        store_golden=store_golden,
    )
    with progress() as report:
        job = Job.of_bundle(
            opened,
            checkpoint=checkpoint,
            revision=revision,
            images=images,
            layer_by_layer=layer_by_layer,
            bounds=bundled_bounds(opened, min_pixels, max_pixels, engine=engine),
            trust_remote_code=trust_remote_code,
            report=report,
        )
        parity = pipeline.validate(job, wanted)
    finish(opened, parity, junit=junit, markdown=markdown, as_json=as_json)


def recipe_and_checkpoint(
    source: str | None, model: str | None, checkpoint: str | None, revision: str | None = None
) -> "tuple[Recipe, str]":
    """The recipe that is named, or the checkpoint's own; the checkpoint that is given, or the recipe's own.

    Args:
        source: the command's argument.
        model: `--model`.
        checkpoint: `--checkpoint`.
        revision: of a hub id.

    Raises:
        CapaError: neither is given, or the checkpoint twice, or no recipe is for it.
    """
    if source is not None and checkpoint is not None:
        raise CapaError(f"the checkpoint is given twice: {source}, and --checkpoint {checkpoint}", ExitCode.USAGE)
    given = source or checkpoint
    if model is not None:
        from capa_export.config.recipe import load_recipe

        recipe = load_recipe(model)
        return recipe, given or recipe.checkpoint
    if given is None:
        raise CapaError("name a checkpoint, a folder or a hub id, or a recipe with --model", ExitCode.USAGE)
    from capa_export.model.recipe_choice import find_recipe

    return find_recipe(given, revision), given


def with_options(
    recipe: "Recipe",
    ratio: float | None = None,
    prune_layer: int | None = None,
    selector: str | None = None,
    min_keep_per_image: int | None = None,
    fp32_layers: str | None = None,
    *,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    target: "Target | None" = None,
) -> "Recipe":
    """The recipe with the command line's choices, and what the target takes, in it."""
    parts = None if fp32_layers is None else [part.strip() for part in fp32_layers.split(",") if part.strip()]
    changed = recipe.with_options(
        ratio=ratio,
        prune_layer=prune_layer,
        selector=selector,
        min_keep_per_image=min_keep_per_image,
        fp32_layers=parts,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
    )
    return changed.model_copy(update={"pictures": changed.pictures.on_target(target)})


def check_places(*paths: Path | None) -> None:
    """Refuse to work for long for a file that could not be written.

    Raises:
        CapaError: a path is a folder, or its folder does not exist.
    """
    for path in paths:
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            problem = "is a folder" if path.is_dir() else "its folder does not exist"
            raise CapaError(f"{path}: {problem}; name a file in a folder that exists", ExitCode.USAGE)


def finish(
    bundle: "Bundle",
    parity: "ParityReport",
    *,
    junit: Path | None = None,
    markdown: Path | None = None,
    as_json: bool = False,
) -> None:
    """Print the parity report, and write it in the forms that were asked for; an error where it failed."""
    if junit is not None:
        from capa_export.report.junit import write_junit

        write_junit(junit, parity, bundle.folder.name)
    if markdown is not None:
        from capa_export.report.markdown import write_markdown

        write_markdown(markdown, parity, bundle.manifest)
    if as_json:
        print_json(parity.model_dump(mode="json"))
    else:
        from capa_export.report.terminal import parity_table

        parity_table(parity)
    if not parity.passed:
        raise CapaError(f"{bundle.folder}: {parity.failures[0]}; see {bundle.folder / 'parity.json'}", ExitCode.PARITY)
