"""The command line. Heavy imports live inside the commands, so that `--help` answers at once."""

import os
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import capa_export
from capa_export.cli_options import (
    BuildWeights,
    BuildWeightsOpt,
    BundleArg,
    CalibrationOpt,
    CheckpointOpt,
    ExportWeights,
    ExportWeightsOpt,
    FfnOpt,
    ImagesOpt,
    JsonOpt,
    LayerByLayerOpt,
    LayerOpt,
    MinKeepOpt,
    ModelOpt,
    OutOpt,
    Precision,
    PrecisionOpt,
    RatioOpt,
    RevisionOpt,
    SamplesOpt,
    TargetOpt,
    Weights,
    WeightsOpt,
)
from capa_export.cli_run import run
from capa_export.cli_show import inspect, models, print_json, targets
from capa_export.errors import CapaError, ExitCode

if TYPE_CHECKING:
    from capa_export.bundle import Bundle
    from capa_export.recipe import Recipe

__all__ = ["app", "main"]

app = typer.Typer(
    name="capa-export",
    help="Export vision-language models, pruned with CAPA, to ONNX and TensorRT.",
    epilog="Exit codes: 0 ok, 2 usage, 3 preflight, 4 export, 5 engine, 6 parity, 130 or 143 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    if version:
        print(capa_export.__version__)
        raise typer.Exit


@app.command()
def build(
    model: ModelOpt,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Bundle folder; not needed with --dry-run.")] = None,
    checkpoint: CheckpointOpt = None,
    revision: RevisionOpt = None,
    ratio: RatioOpt = None,
    prune_layer: LayerOpt = None,
    min_keep_per_image: MinKeepOpt = None,
    ffn: FfnOpt = True,
    images: ImagesOpt = None,
    samples: SamplesOpt = None,
    layer_by_layer: LayerByLayerOpt = None,
    calibration: CalibrationOpt = None,
    precision: PrecisionOpt = Precision.fp16,
    target: TargetOpt = "rtx",
    weights: BuildWeightsOpt = BuildWeights.embedded,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop: FLOPs, sizes, memory.")] = False,
    as_json: JsonOpt = False,
) -> None:
    """Checkpoint in, validated bundle out: all stages in order."""
    from capa_export.target import load_target

    recipe = _recipe(model, ratio, prune_layer, min_keep_per_image)
    device = load_target(target)
    device.require_precision(precision.value)
    if device.engine:
        device.require_engine()
    elif weights == BuildWeights.external:
        raise CapaError(f"--weights external: target {device.name} has no engine to share them", ExitCode.USAGE)
    if calibration is not None and (samples is not None or layer_by_layer is not None):
        option = "--samples" if samples is not None else "--layer-by-layer or --in-memory"
        raise CapaError(f"--calibration stands in place of a run: {option} has no effect with it", ExitCode.USAGE)
    if dry_run:
        _print_plan(
            recipe,
            checkpoint,
            out,
            precision.value,
            ffn=ffn,
            revision=revision,
            calibration=calibration,
            target=device,
            weights=weights.value,
            as_json=as_json,
        )
        return
    if out is None:
        raise CapaError("build needs --out FOLDER; only --dry-run does without", ExitCode.USAGE)
    from capa_export import pipeline
    from capa_export.bundle import Bundle
    from capa_export.job import Job
    from capa_export.progress import progress

    with progress() as report:
        job = Job(
            recipe=recipe,
            bundle=Bundle(out),
            checkpoint=checkpoint or recipe.checkpoint,
            revision=revision,
            images=images,
            samples=samples,
            layer_by_layer=layer_by_layer,
            calibration=calibration,
            precision=precision.value,
            ffn=ffn,
            weights="embedded" if weights == BuildWeights.embedded else "external",
            in_place=weights == BuildWeights.in_place,
            command=sys.argv[1:],
            report=report,
        )
        parity = pipeline.build(job, device)
    if device.engine and not as_json:
        from capa_export.tables import engine_table

        engine_table(job.bundle.stage(f"engine/{device.name}")["result"])
    _finish(job.bundle, parity, as_json=as_json)


@app.command()
def calibrate(
    out: OutOpt,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Recipe: a name from `models`, or the path of a .toml.")
    ] = None,
    checkpoint: CheckpointOpt = None,
    revision: RevisionOpt = None,
    images: ImagesOpt = None,
    samples: SamplesOpt = None,
    layer_by_layer: LayerByLayerOpt = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Add up finished calibrations instead of running one.")
    ] = False,
    parts: Annotated[
        list[Path] | None, typer.Argument(help="With --merge: calibration files or bundle folders.")
    ] = None,
    as_json: JsonOpt = False,
) -> None:
    """Measure which visual FFNs are linear, and their scales."""
    from capa_export import pipeline
    from capa_export.bundle import Bundle
    from capa_export.calibration import Calibration, merged
    from capa_export.job import Job
    from capa_export.progress import progress
    from capa_export.recipe import FFN

    if merge:
        if not parts or images or samples or checkpoint or revision or layer_by_layer is not None:
            raise CapaError(
                "--merge takes calibrations as arguments, and nothing else but --out and --model", ExitCode.USAGE
            )
        calibration = merged([Calibration.load(part) for part in parts])
        pipeline.adopt_calibration(Bundle(out), calibration)
        ffn = _recipe(model).ffn if model else FFN()
    else:
        if model is None or parts:
            raise CapaError("calibrate needs --model and takes no arguments without --merge", ExitCode.USAGE)
        recipe = _recipe(model)
        with progress() as report:
            job = Job(
                recipe=recipe,
                bundle=Bundle(out),
                checkpoint=checkpoint or recipe.checkpoint,
                revision=revision,
                images=images,
                samples=samples,
                layer_by_layer=layer_by_layer,
                report=report,
            )
            calibration = pipeline.calibrate(job)
        ffn = recipe.ffn
    summary = calibration.summary(ffn.eta, ffn.paper_layers)
    if as_json:
        print_json(summary)
    else:
        from capa_export.tables import calibration_table

        calibration_table(summary)


@app.command()
def export(
    model: ModelOpt,
    out: OutOpt,
    checkpoint: CheckpointOpt = None,
    revision: RevisionOpt = None,
    ratio: RatioOpt = None,
    prune_layer: LayerOpt = None,
    min_keep_per_image: MinKeepOpt = None,
    ffn: FfnOpt = True,
    calibration: CalibrationOpt = None,
    precision: PrecisionOpt = Precision.fp16,
    weights: ExportWeightsOpt = ExportWeights.copied,
    as_json: JsonOpt = False,
) -> None:
    """Write the ONNX files of a calibrated bundle."""
    from capa_export import pipeline
    from capa_export.bundle import Bundle
    from capa_export.job import Job
    from capa_export.progress import progress

    recipe, bundle = _recipe(model, ratio, prune_layer, min_keep_per_image), Bundle(out)
    with progress() as report:
        job = Job(
            recipe=recipe,
            bundle=bundle,
            checkpoint=checkpoint or recipe.checkpoint,
            revision=revision,
            calibration=calibration,
            precision=precision.value,
            ffn=ffn,
            in_place=weights == ExportWeights.in_place,
            command=sys.argv[1:],
            report=report,
        )
        if calibration is not None:
            pipeline.calibrate(job)
        pipeline.export(job)
    if as_json:
        print_json(bundle.stage("export"))


@app.command()
def engine(
    bundle: BundleArg, target: TargetOpt = "rtx", weights: WeightsOpt = Weights.embedded, as_json: JsonOpt = False
) -> None:
    """Build a bundle's TensorRT engines."""
    from capa_export import pipeline
    from capa_export.bundle import Bundle
    from capa_export.progress import progress
    from capa_export.target import load_target

    device = load_target(target)
    with progress() as report:
        result = pipeline.engine(Bundle.open(bundle), device, weights=weights.value, report=report)
    if as_json:
        print_json(result)
    else:
        from capa_export.tables import engine_table

        engine_table(result)


@app.command()
def validate(
    bundle: BundleArg,
    checkpoint: CheckpointOpt = None,
    revision: RevisionOpt = None,
    images: ImagesOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Hold a bundle against the eager model (exit code 6: parity)."""
    from capa_export import pipeline
    from capa_export.bundle import Bundle
    from capa_export.job import Job
    from capa_export.progress import progress

    opened = Bundle.open(bundle)
    with progress() as report:
        job = Job.of_bundle(opened, checkpoint=checkpoint, revision=revision, images=images, report=report)
        parity = pipeline.validate(job)
    _finish(opened, parity, as_json=as_json)


app.command()(run)
app.command()(inspect)


@app.command()
def plan(
    model: ModelOpt,
    checkpoint: CheckpointOpt = None,
    ratio: RatioOpt = None,
    prune_layer: LayerOpt = None,
    min_keep_per_image: MinKeepOpt = None,
    ffn: FfnOpt = True,
    precision: PrecisionOpt = Precision.fp16,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Bundle whose calibration says which layers are linear.")
    ] = None,
    target: TargetOpt = "rtx",
    weights: BuildWeightsOpt = BuildWeights.embedded,
    as_json: JsonOpt = False,
) -> None:
    """Say what a build would do, as `build --dry-run`."""
    build(
        model=model,
        out=out,
        checkpoint=checkpoint,
        ratio=ratio,
        prune_layer=prune_layer,
        min_keep_per_image=min_keep_per_image,
        ffn=ffn,
        precision=precision,
        target=target,
        weights=weights,
        dry_run=True,
        as_json=as_json,
    )


app.command()(models)
app.command()(targets)


def _recipe(
    model: str, ratio: float | None = None, prune_layer: int | None = None, min_keep_per_image: int | None = None
) -> "Recipe":
    from capa_export.recipe import load_recipe

    return load_recipe(model).with_options(ratio=ratio, prune_layer=prune_layer, min_keep_per_image=min_keep_per_image)


def _finish(bundle: "Bundle", parity: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(parity)
    else:
        from capa_export.tables import parity_table

        parity_table(parity)
    if not parity["passed"]:
        raise CapaError(
            f"{bundle.folder}: {parity['failures'][0]}; see {bundle.folder / 'parity.json'}", ExitCode.PARITY
        )


def _print_plan(
    recipe: "Recipe", checkpoint: str | None, out: Path | None, precision: str, *, as_json: bool, **options: Any
) -> None:
    from capa_export.dry_run import dry_run

    result = dry_run(recipe, checkpoint or recipe.checkpoint, out, precision, **options)
    if as_json:
        print_json(result)
    else:
        from capa_export.tables import plan_table

        plan_table(result)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the one place where an error becomes a line and an exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # Threads that wait by spinning take several times as long on a machine that is busy otherwise.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    terminated = False

    def terminate(*_: object) -> None:
        nonlocal terminated
        terminated = True
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        result = app([word for word in arguments if word != "--debug"], standalone_mode=False, prog_name="capa-export")
        if result == ExitCode.INTERRUPTED:
            raise KeyboardInterrupt
        return result if isinstance(result, int) else ExitCode.OK
    except CapaError as error:
        if "--debug" in arguments:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return error.code
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        return ExitCode.TERMINATED if terminated else ExitCode.INTERRUPTED
    except typer.TyperException as error:
        error.show()  # pyright: ignore[reportAttributeAccessIssue]  # All that parsing raises have it.
        if "unexpected extra argument" in str(error) and "--image" in arguments:
            print("give --image once per picture", file=sys.stderr)
        return ExitCode.USAGE
    finally:
        signal.signal(signal.SIGTERM, previous)
