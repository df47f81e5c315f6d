"""The options that several commands share, each declared once."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from capa_export.base.precision import Precision
from capa_export.base.quantities import parse_bytes
from capa_export.config.plugins import PluginWish
from capa_export.config.provider import Provider
from capa_export.config.weights import WeightsWish

__all__ = [
    "CALIBRATION",
    "ENGINE",
    "GENERATION",
    "MACHINE",
    "MODEL",
    "OUTPUT",
    "PANELS",
    "PICTURES",
    "PRECISION",
    "PRUNING",
    "QUESTIONS",
    "VALIDATION",
    "AutoPrecisionOpt",
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
    "KitOpt",
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
    "ProviderOpt",
    "QuantizeHeadOpt",
    "QuantizeOpt",
    "QuantizeVisionOpt",
    "RatioOpt",
    "RayOpt",
    "RevisionOpt",
    "SamplesOpt",
    "ScheduleOpt",
    "SelectorOpt",
    "SignOpt",
    "SourceArg",
    "StoreGoldenOpt",
    "StrictOpt",
    "TargetOpt",
    "TrustOpt",
    "ValidationSamplesOpt",
    "VerifyKeyOpt",
    "VerifyOpt",
    "WeightsOpt",
    "WorkersOpt",
]

MODEL = "Model"
PICTURES = "Pictures"
QUESTIONS = "Questions"
PRUNING = "Pruning"
CALIBRATION = "Calibration"
PRECISION = "Precision"
ENGINE = "Engine"
VALIDATION = "Validation"
GENERATION = "Generation"
MACHINE = "This machine"
OUTPUT = "Output"
PANELS = (
    *(MODEL, PICTURES, QUESTIONS, PRUNING, CALIBRATION, PRECISION, ENGINE),
    *(VALIDATION, GENERATION, MACHINE, OUTPUT),
)
"""Headings that `--help` groups options under, in its order."""


SourceArg = Annotated[
    str | None,
    typer.Argument(metavar="CHECKPOINT", help="Local folder or hub id; its config.json says which recipe is for it."),
]
ModelOpt = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="Recipe: a name from `models`, or the path of a .toml [default: the checkpoint's].",
        rich_help_panel=MODEL,
    ),
]
CheckpointOpt = Annotated[
    str | None,
    typer.Option(
        help="Local folder or hub id [default: the recipe's; for a bundle, the one it came from].",
        rich_help_panel=MODEL,
    ),
]
RevisionOpt = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.", rich_help_panel=MODEL)]
RatioOpt = Annotated[
    float | None,
    typer.Option(
        help="Fraction of visual tokens removed, 0 <= r < 1, where the recipe's schedule has one stage "
        "[default: the recipe's].",
        rich_help_panel=PRUNING,
    ),
]
ScheduleOpt = Annotated[
    str | None,
    typer.Option(
        help="What drops visual tokens, at which layer, and the fraction removed, as capa@3:0.75, divprune:0.9 or "
        "divprune:0.5+capa@4:0.9; /full keeps linear visual FFNs, /eta=0.97 is another threshold for their scale "
        "[default: the recipe's].",
        rich_help_panel=PRUNING,
    ),
]
# What --schedule replaces: to be removed with the next version.
LayerOpt = Annotated[int | None, typer.Option("--prune-layer", hidden=True)]
SelectorOpt = Annotated[str | None, typer.Option("--selector", hidden=True)]
FfnOpt = Annotated[bool | None, typer.Option("--ffn/--no-ffn", hidden=True)]
MinKeepOpt = Annotated[
    int | None,
    typer.Option(
        min=0, help="Visual tokens that each image keeps at least [default: the recipe's].", rich_help_panel=PRUNING
    ),
]
FfnBudgetOpt = Annotated[
    float | None,
    typer.Option(
        help="Nats of KL that scales in the place of visual FFNs may cost, all layers together "
        "[default: the recipe's].",
        rich_help_panel=PRUNING,
    ),
]
MinPixelsOpt = Annotated[
    int | None,
    typer.Option(
        help="Least area that a picture or frame is resized to [default: the image processor's].",
        rich_help_panel=PICTURES,
    ),
]
MaxPixelsOpt = Annotated[
    int | None,
    typer.Option(
        help="Largest area that a picture or frame is resized to [default: what the target takes, or the bundle's].",
        rich_help_panel=PICTURES,
    ),
]
ImagesOpt = Annotated[
    Path | None,
    typer.Option(
        help="Folder of pictures, a picture, a quoted pattern, or .jsonl of conversations or of picture, question and "
        "answer [default: the recipe's built-in scenes, if any].",
        rich_help_panel=PICTURES,
    ),
]
SamplesOpt = Annotated[
    int | None, typer.Option(min=1, help="Calibration samples [default: the recipe's].", rich_help_panel=CALIBRATION)
]
ValidationSamplesOpt = Annotated[
    int | None,
    typer.Option(
        "--validation-samples",
        min=1,
        help="Prompts to compare and questions to ask [default: the recipe's numbers].",
        rich_help_panel=VALIDATION,
    ),
]
LayerByLayerOpt = Annotated[
    bool | None,
    typer.Option(
        "--layer-by-layer/--in-memory",
        help="Hold one layer's weights in memory at a time [default: where the FP32 models do not fit].",
        rich_help_panel=MACHINE,
    ),
]
CalibrationOpt = Annotated[
    Path | None,
    typer.Option(help="Finished calibration, a file or a bundle, instead of a run.", rich_help_panel=CALIBRATION),
]
PrecisionOpt = Annotated[
    Precision, typer.Option(help="Precision of weights and activations.", rich_help_panel=PRECISION)
]
TargetOpt = Annotated[
    str,
    typer.Option(
        "--target", "-t", help="Device: a name from `targets`, or the path of a .toml.", rich_help_panel=ENGINE
    ),
]
QuantizeOpt = Annotated[
    str | None,
    typer.Option(
        metavar="none|int4[:GROUP][/rtn]|int8|fp8|nvfp4",
        help="Weights of the decoder's layers: int4 rounds plain ones, in groups of 32, 64 or 128 inputs [128], scaled "
        "by the samples' activations, or with /rtn to nearest; int8, fp8 and nvfp4 round to nearest, or keep what the "
        "checkpoint has in the type; none expands those of a quantized checkpoint [default: "
        "as the checkpoint has them].",
        rich_help_panel=PRECISION,
    ),
]
QuantizeHeadOpt = Annotated[
    str | None,
    typer.Option(
        metavar="none|int8|int4[:GROUP]|fp8",
        help="Weight of the LM head, rounded to nearest, whatever --quantize makes of the layers; an embedding that "
        "shares it stays as it is [default: none].",
        rich_help_panel=PRECISION,
    ),
]
QuantizeVisionOpt = Annotated[
    str | None,
    typer.Option(
        metavar="none|int8|fp8",
        help="Weights of the vision tower's blocks, rounded to nearest; what merges and projects their outputs stays "
        "as it is [default: none].",
        rich_help_panel=PRECISION,
    ),
]
AutoPrecisionOpt = Annotated[
    bool,
    typer.Option(
        "--auto-precision",
        help="Leave as they are the fewest decoder layers that bring what --quantize costs within the recipe's "
        "quantization_budget, 0.02 nats of KL by default.",
        rich_help_panel=PRECISION,
    ),
]
_AUTO = "auto takes embedded where the decoder has at most 1 GiB, and joined beyond it for few bits on TensorRT-RTX"
WeightsOpt = Annotated[
    WeightsWish,
    typer.Option(
        help="In each engine, in one that is prefill and decode (joined), or inputs that both share (external); "
        f"{_AUTO}.",
        rich_help_panel=ENGINE,
    ),
]
_IN_PLACE = "the checkpoint's own files, hard-linked where --precision is theirs: not read, so not searched for NaN"
ExportWeightsOpt = Annotated[
    Literal["copied", "in-place"],
    typer.Option(help=f"In a copy, or in-place: {_IN_PLACE}.", rich_help_panel=PRECISION),
]
BuildWeightsOpt = Annotated[
    Literal["auto", "embedded", "joined", "external", "in-place"],
    typer.Option(
        help="In each engine, in one that is prefill and decode (joined), or inputs that both share (external): from "
        f"a copy, or in-place: {_IN_PLACE}; {_AUTO}.",
        rich_help_panel=ENGINE,
    ),
]
MemoryOpt = Annotated[
    int | None,
    typer.Option(
        parser=parse_bytes,
        metavar="SIZE",
        help="Memory of the device that runs the bundle, as 8GB: what it has no room for is refused.",
        rich_help_panel=ENGINE,
    ),
]
PluginsOpt = Annotated[
    PluginWish,
    typer.Option(
        help="What computes the CAPA nodes in engines: kernels launched from Python, kernels in a library, or "
        "TensorRT's own layers; auto takes the library if one is given, or else Python where Triton is installed.",
        rich_help_panel=ENGINE,
    ),
]
KitOpt = Annotated[
    bool,
    typer.Option(
        "--kit",
        help="Write a kit for the target's own machine, where engines are otherwise built with the GPU that is here.",
        rich_help_panel=ENGINE,
    ),
]
PluginLibraryOpt = Annotated[
    Path | None, typer.Option(help="What `capa-export plugins build` wrote.", rich_help_panel=ENGINE)
]
EngineOpt = Annotated[
    str | None,
    typer.Option(
        help="Run this target's engines on the GPU [default: ONNX Runtime on the CPU].", rich_help_panel=ENGINE
    ),
]
ProviderOpt = Annotated[
    Provider,
    typer.Option(help="ONNX Runtime's execution provider; a GPU's needs onnxruntime-gpu.", rich_help_panel=ENGINE),
]
Fp32LayersOpt = Annotated[
    str | None,
    typer.Option(
        "--fp32-layers",
        help="Parts in FP32, as 3,5.mlp,residual,visual.31; the audit adds its own [default: the recipe's].",
        rich_help_panel=PRECISION,
    ),
]
GateOpt = Annotated[
    Path | None, typer.Option("--gate", help="TOML with bounds in place of the recipe's.", rich_help_panel=VALIDATION)
]
StrictOpt = Annotated[bool, typer.Option("--strict", help="Warnings are failures too.", rich_help_panel=VALIDATION)]
AcceptMethodLossOpt = Annotated[
    bool,
    typer.Option(
        "--accept-method-loss",
        help="Fit to ship however many answers the method changes (else exit code 7).",
        rich_help_panel=VALIDATION,
    ),
]
BisectOpt = Annotated[
    bool,
    typer.Option(
        "--bisect",
        help="Where the gates fail, find the layer, block and operator at fault.",
        rich_help_panel=VALIDATION,
    ),
]
StoreGoldenOpt = Annotated[
    int,
    typer.Option(
        "--store-golden",
        min=0,
        help="Samples to leave in the bundle, to validate without a checkpoint.",
        rich_help_panel=VALIDATION,
    ),
]
JunitOpt = Annotated[
    Path | None, typer.Option("--junit", help="Write the checks as JUnit XML.", rich_help_panel=OUTPUT)
]
MarkdownOpt = Annotated[
    Path | None, typer.Option("--markdown", help="Write a summary for a pull request.", rich_help_panel=OUTPUT)
]
TrustOpt = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Let the checkpoint's own Python run, for its processors.", rich_help_panel=MODEL
    ),
]
WorkersOpt = Annotated[
    int | None,
    typer.Option(
        min=1, help="Processes that share the samples; each holds the model [default: 1].", rich_help_panel=MACHINE
    ),
]
RayOpt = Annotated[
    str | None,
    typer.Option(
        help="Share the samples over the Ray cluster at this address, --workers at a time.", rich_help_panel=MACHINE
    ),
]
OutOpt = Annotated[Path, typer.Option("--out", "-o", help="Bundle folder.", rich_help_panel=OUTPUT)]
BundleArg = Annotated[Path, typer.Argument(help="Bundle folder.")]
VerifyOpt = Annotated[
    bool,
    typer.Option(
        "--verify",
        help="Read every file of the bundle, also what has not changed since it was read.",
        rich_help_panel=VALIDATION,
    ),
]
VerifyKeyOpt = Annotated[
    Path | None,
    typer.Option(
        "--verify-key",
        metavar="PUB",
        help="Ed25519 public key, in PEM, that must have signed the bundle; every file that is used is read.",
        rich_help_panel=VALIDATION,
    ),
]
SignOpt = Annotated[
    Path | None,
    typer.Option(
        "--sign",
        metavar="KEY",
        help="Ed25519 private key, in PEM, that signs the bundle when it is done.",
        rich_help_panel=OUTPUT,
    ),
]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.", rich_help_panel=OUTPUT)]
