"""The command that finds a schedule for a budget."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from capa_export.base.quantities import parse_budget
from capa_export.cli.arguments import check_places, one_checkpoint
from capa_export.cli.options import (
    CALIBRATION,
    OUTPUT,
    PRUNING,
    AutoPrecisionOpt,
    CalibrationOpt,
    CheckpointOpt,
    ImagesOpt,
    JsonOpt,
    MaxPixelsOpt,
    MinPixelsOpt,
    ModelOpt,
    QuantizeHeadOpt,
    QuantizeOpt,
    QuantizeVisionOpt,
    RevisionOpt,
    SourceArg,
    TrustOpt,
)
from capa_export.cli.results import print_result

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
    quantize: QuantizeOpt = None,
    quantize_head: QuantizeHeadOpt = None,
    quantize_vision: QuantizeVisionOpt = None,
    auto_precision: AutoPrecisionOpt = False,
    min_pixels: MinPixelsOpt = None,
    max_pixels: MaxPixelsOpt = None,
    trust_remote_code: TrustOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Find the schedule closest to dense within a budget of FLOPs."""
    check_places(out)
    from capa_export.api import studies
    from capa_export.base.progress import progress

    with progress() as report:
        found = studies.tune(
            one_checkpoint(source, checkpoint),
            budget=budget,
            out=out,
            recipe=model,
            revision=revision,
            images=images,
            samples=samples,
            calibration=calibration,
            quantize=quantize,
            quantize_head=quantize_head,
            quantize_vision=quantize_vision,
            auto_precision=auto_precision,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            trust_remote_code=trust_remote_code,
            command=sys.argv[1:],
            progress=report,
        )
    if as_json:
        print_result(found)
    else:
        from capa_export.study.tune.table import tuning_table

        tuning_table(found)
