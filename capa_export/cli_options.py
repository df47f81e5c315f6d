"""The options that several commands share, each declared once."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "BundleArg",
    "CalibrationOpt",
    "CheckpointOpt",
    "FfnOpt",
    "ImagesOpt",
    "JsonOpt",
    "LayerOpt",
    "ModelOpt",
    "OutOpt",
    "Precision",
    "PrecisionOpt",
    "RatioOpt",
    "RevisionOpt",
    "SamplesOpt",
    "TargetOpt",
    "Weights",
    "WeightsOpt",
]


class Precision(str, Enum):
    """Of weights and activations."""

    fp16 = "fp16"
    bf16 = "bf16"
    fp32 = "fp32"


class Weights(str, Enum):
    """Where an engine finds its weights."""

    embedded = "embedded"
    external = "external"


ModelOpt = Annotated[str, typer.Option("--model", "-m", help="Recipe: a name from `models`, or the path of a .toml.")]
CheckpointOpt = Annotated[
    str | None, typer.Option(help="Local folder or hub id [default: the recipe's; for a bundle, the one it came from].")
]
RevisionOpt = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
RatioOpt = Annotated[
    float | None, typer.Option(help="Fraction of visual tokens removed, 0 <= r < 1 [default: the recipe's].")
]
LayerOpt = Annotated[
    int | None, typer.Option(help="Layer after whose attention tokens are dropped [default: the recipe's].")
]
FfnOpt = Annotated[bool, typer.Option("--ffn/--no-ffn", help="Replace linear FFNs of visual tokens by a scale.")]
ImagesOpt = Annotated[
    Path | None, typer.Option(help="Folder of pictures [default: built-in scenes, where the recipe has them].")
]
SamplesOpt = Annotated[int | None, typer.Option(min=1, help="Calibration samples [default: the recipe's].")]
CalibrationOpt = Annotated[
    Path | None, typer.Option(help="Finished calibration, a file or a bundle, instead of a run.")
]
PrecisionOpt = Annotated[Precision, typer.Option(help="Precision of weights and activations.")]
TargetOpt = Annotated[
    str, typer.Option("--target", "-t", help="Device: a name from `targets`, or the path of a .toml.")
]
WeightsOpt = Annotated[Weights, typer.Option(help="In the engines, or inputs that engines share.")]
OutOpt = Annotated[Path, typer.Option("--out", "-o", help="Bundle folder.")]
BundleArg = Annotated[Path, typer.Argument(help="Bundle folder.")]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
