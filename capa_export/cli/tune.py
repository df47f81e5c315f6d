"""The command that finds a schedule for a budget."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from capa_export.base.errors import CapaError, ExitCode
from capa_export.base.quantities import parse_budget
from capa_export.cli.options import (
    CALIBRATION,
    OUTPUT,
    PRUNING,
    CalibrationOpt,
    CheckpointOpt,
    ImagesOpt,
    JsonOpt,
    MaxPixelsOpt,
    MinPixelsOpt,
    ModelOpt,
    RevisionOpt,
    SourceArg,
    TrustOpt,
)
from capa_export.cli.stages import check_places, one_checkpoint

__all__ = ["tune"]


def tune(
    budget: Annotated[
        float,
        typer.Option(
            parser=parse_budget,
            metavar="NUMBER",
            help="FLOPs of the decoder's prefill, text included: a fraction of dense, as 0.25 or 25%, or of a "
            "prompt, as 2.5e12.",
            rich_help_panel=PRUNING,
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The recipe that is written, a .toml file.", rich_help_panel=OUTPUT)
    ],
    source: SourceArg = None,
    model: ModelOpt = None,
    checkpoint: CheckpointOpt = None,
    revision: RevisionOpt = None,
    images: ImagesOpt = None,
    samples: Annotated[
        int, typer.Option(min=1, help="Calibration samples to tune on.", rich_help_panel=CALIBRATION)
    ] = 128,
    calibration: CalibrationOpt = None,
    min_pixels: MinPixelsOpt = None,
    max_pixels: MaxPixelsOpt = None,
    trust_remote_code: TrustOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Find the schedule closest to dense within a budget of FLOPs."""
    if out.suffix != ".toml":
        raise CapaError(f"{out}: a recipe is a .toml file", ExitCode.USAGE)
    check_places(out)
    from tempfile import TemporaryDirectory

    from capa_export.api import builds
    from capa_export.base.progress import progress
    from capa_export.bundle.store import Bundle
    from capa_export.config.options import BuildOptions
    from capa_export.study.tune.recipe_file import write_recipe
    from capa_export.study.tune.stage import tune as find

    with progress() as report, TemporaryDirectory() as scratch:
        opened = builds.find_model(
            *(one_checkpoint(source, checkpoint), model),
            revision=revision,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            trust_remote_code=trust_remote_code,
            progress=report,
        )
        options = BuildOptions(images=images, calibration=calibration, samples=samples)
        tuned, found = find(opened, Bundle(Path(scratch)), options, budget)
    best = next(row for row in found.finalists if row.method == found.chosen)
    figures = f"{best.flops:.3f} of dense's FLOPs, KL {best.kl:.3g} nats, top-1 {best.top1:.3f}"
    write_recipe(
        out,
        tuned.for_any_target(),
        f"Made by capa-export {shlex.join(sys.argv[1:])}\n{found.chosen}: {figures}\n{found.verdict}",
    )
    if as_json:
        print(found.model_dump_json(indent=2))
    else:
        from capa_export.study.tune.table import tuning_table

        tuning_table(found)
