"""The options that several commands share, each declared once."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from capa_export.base.precision import Precision
from capa_export.base.quantities import parse_bytes
from capa_export.config.plugins import PluginWish
from capa_export.config.weights import WeightsWish

__all__ = [
    "BisectOpt",
    "BuildWeightsOpt",
    "BundleArg",
    "CalibrationOpt",
    "CheckpointOpt",
    "EngineOpt",
    "ExportWeightsOpt",
    "FfnOpt",
    "Fp32LayersOpt",
    "GateOpt",
    "ImagesOpt",
    "JsonOpt",
    "JunitOpt",
    "LayerByLayerOpt",
    "LayerOpt",
    "MarkdownOpt",
    "MaxPixelsOpt",
    "MemoryOpt",
    "MinKeepOpt",
    "MinPixelsOpt",
    "ModelOpt",
    "OutOpt",
    "PluginLibraryOpt",
    "PluginsOpt",
    "PrecisionOpt",
    "RatioOpt",
    "RayOpt",
    "RevisionOpt",
    "SamplesOpt",
    "SelectorOpt",
    "SourceArg",
    "StoreGoldenOpt",
    "StrictOpt",
    "TargetOpt",
    "TrustOpt",
    "ValidationSamplesOpt",
    "VerifyOpt",
    "WeightsOpt",
    "WorkersOpt",
]


SourceArg = Annotated[
    str | None,
    typer.Argument(metavar="CHECKPOINT", help="Local folder or hub id; its config.json says which recipe is for it."),
]
ModelOpt = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", help="Recipe: a name from `models`, or the path of a .toml [default: the checkpoint's]."
    ),
]
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
SelectorOpt = Annotated[
    str | None,
    typer.Option("--selector", help="What chooses the tokens; `selectors` lists them [default: the recipe's]."),
]
MinKeepOpt = Annotated[
    int | None, typer.Option(min=0, help="Visual tokens that each image keeps at least [default: the recipe's].")
]
MinPixelsOpt = Annotated[
    int | None, typer.Option(help="Least area that a picture or frame is resized to [default: the image processor's].")
]
MaxPixelsOpt = Annotated[
    int | None,
    typer.Option(
        help="Largest area that a picture or frame is resized to [default: what the target takes, or the bundle's]."
    ),
]
FfnOpt = Annotated[bool, typer.Option("--ffn/--no-ffn", help="Replace linear FFNs of visual tokens by a scale.")]
ImagesOpt = Annotated[
    Path | None,
    typer.Option(
        help="Folder of pictures, a picture, a quoted pattern, or .jsonl of conversations or of picture, question and "
        "answer [default: the recipe's built-in scenes, if any]."
    ),
]
SamplesOpt = Annotated[int | None, typer.Option(min=1, help="Calibration samples [default: the recipe's].")]
ValidationSamplesOpt = Annotated[
    int | None,
    typer.Option(
        "--validation-samples", min=1, help="Prompts to compare and questions to ask [default: the recipe's numbers]."
    ),
]
LayerByLayerOpt = Annotated[
    bool | None,
    typer.Option(
        "--layer-by-layer/--in-memory",
        help="Hold one layer's weights in memory at a time [default: where the FP32 models do not fit].",
    ),
]
CalibrationOpt = Annotated[
    Path | None, typer.Option(help="Finished calibration, a file or a bundle, instead of a run.")
]
PrecisionOpt = Annotated[Precision, typer.Option(help="Precision of weights and activations.")]
TargetOpt = Annotated[
    str, typer.Option("--target", "-t", help="Device: a name from `targets`, or the path of a .toml.")
]
_AUTO = "auto takes embedded where the decoder has at most 1 GiB"
WeightsOpt = Annotated[WeightsWish, typer.Option(help=f"In the engines, or inputs that engines share; {_AUTO}.")]
_IN_PLACE = "the checkpoint's own files, hard-linked where --precision is theirs: not read, so not searched for NaN"
ExportWeightsOpt = Annotated[Literal["copied", "in-place"], typer.Option(help=f"In a copy, or in-place: {_IN_PLACE}.")]
BuildWeightsOpt = Annotated[
    Literal["auto", "embedded", "external", "in-place"],
    typer.Option(help=f"In the engines, or inputs that engines share: from a copy, or in-place: {_IN_PLACE}; {_AUTO}."),
]
MemoryOpt = Annotated[
    int | None,
    typer.Option(
        parser=parse_bytes,
        metavar="SIZE",
        help="Memory of the device that runs the bundle, as 8GB: what it has no room for is refused.",
    ),
]
PluginsOpt = Annotated[
    PluginWish,
    typer.Option(
        help="What computes the CAPA nodes in engines: kernels launched from Python, kernels in a library, or "
        "TensorRT's own layers; auto takes the library if one is given, or else Python where Triton is installed."
    ),
]
PluginLibraryOpt = Annotated[Path | None, typer.Option(help="What `capa-export plugins build` wrote.")]
EngineOpt = Annotated[
    str | None, typer.Option(help="Run this target's engines on the GPU [default: ONNX Runtime on the CPU].")
]
Fp32LayersOpt = Annotated[
    str | None,
    typer.Option(
        "--fp32-layers",
        help="Parts in FP32, as 3,5.mlp,residual,visual.31; the audit adds its own [default: the recipe's].",
    ),
]
GateOpt = Annotated[Path | None, typer.Option("--gate", help="TOML with bounds in place of the recipe's.")]
StrictOpt = Annotated[bool, typer.Option("--strict", help="Warnings are failures too.")]
BisectOpt = Annotated[
    bool, typer.Option("--bisect", help="Where the gates fail, find the layer, block and operator at fault.")
]
StoreGoldenOpt = Annotated[
    int, typer.Option("--store-golden", min=0, help="Samples to leave in the bundle, to validate without a checkpoint.")
]
JunitOpt = Annotated[Path | None, typer.Option("--junit", help="Write the checks as JUnit XML.")]
MarkdownOpt = Annotated[Path | None, typer.Option("--markdown", help="Write a summary for a pull request.")]
TrustOpt = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let the checkpoint's own Python run, for its processors.")
]
WorkersOpt = Annotated[
    int | None, typer.Option(min=1, help="Processes that share the samples; each holds the model [default: 1].")
]
RayOpt = Annotated[
    str | None, typer.Option(help="Share the samples over the Ray cluster at this address, --workers at a time.")
]
OutOpt = Annotated[Path, typer.Option("--out", "-o", help="Bundle folder.")]
BundleArg = Annotated[Path, typer.Argument(help="Bundle folder.")]
VerifyOpt = Annotated[
    bool, typer.Option("--verify", help="Read every file of the bundle, also what has not changed since it was read.")
]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
