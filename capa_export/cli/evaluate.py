"""The command that measures methods on questions."""

from pathlib import Path
from typing import Annotated, Any

import typer

from capa_export.base.errors import CapaError, ExitCode
from capa_export.base.progress import say
from capa_export.cli.arguments import one_checkpoint
from capa_export.cli.options import (
    GENERATION,
    OUTPUT,
    PRUNING,
    QUESTIONS,
    AutoPrecisionOpt,
    CalibrationOpt,
    CheckpointOpt,
    ImagesOpt,
    JsonOpt,
    MaxPixelsOpt,
    MinPixelsOpt,
    ModelOpt,
    ProviderOpt,
    QuantizeHeadOpt,
    QuantizeOpt,
    QuantizeVisionOpt,
    RayOpt,
    RevisionOpt,
    SamplesOpt,
    TrustOpt,
    VerifyKeyOpt,
    WorkersOpt,
)
from capa_export.cli.results import print_result

__all__ = ["evaluate"]


def evaluate(
    data: Annotated[
        Path,
        typer.Option(
            "--data",
            "-d",
            help="A .jsonl file of pictures, questions and answers, the folder of a dataset, or pictures alone, as "
            "--images takes them: answers are then only held against the dense model's.",
            rich_help_panel=QUESTIONS,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", help="Folder for the answers; what is there is not asked again.", rich_help_panel=OUTPUT
        ),
    ],
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="BUNDLE|CHECKPOINT",
            help="Bundle; or a checkpoint, a local folder or hub id, whose config.json says which recipe is for it.",
        ),
    ] = None,
    model: ModelOpt = None,
    checkpoint: CheckpointOpt = None,
    revision: RevisionOpt = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="As capa@2:0.75, divprune:0.9/full or divprune:0.5+capa@4:0.9: selector, layer, fraction removed, and "
            "what becomes of linear visual FFNs (scale, full, skip, per-image, eta=0.97); may be given several times "
            "[default: the recipe's].",
            rich_help_panel=PRUNING,
        ),
    ] = None,
    selector: Annotated[
        list[str] | None, typer.Option(help="With each --layer, --ratio and --ffn: a method.", rich_help_panel=PRUNING)
    ] = None,
    layer: Annotated[
        list[int] | None,
        typer.Option(help="May be given several times [default: the selector's].", rich_help_panel=PRUNING),
    ] = None,
    ratio: Annotated[
        list[float] | None,
        typer.Option(help="May be given several times [default: the recipe's].", rich_help_panel=PRUNING),
    ] = None,
    ffn: Annotated[
        list[str] | None, typer.Option(help="May be given several times [default: scale].", rich_help_panel=PRUNING)
    ] = None,
    benchmark: Annotated[
        str | None,
        typer.Option(
            help="mmbench, vqav2, textvqa, gqa, pope or plain [default: told by the dataset's columns].",
            rich_help_panel=QUESTIONS,
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Part of the dataset, where it has several.", rich_help_panel=QUESTIONS)
    ] = None,
    instruction: Annotated[
        str | None,
        typer.Option(
            help="Said behind every question [default: the benchmark's usual one].", rich_help_panel=QUESTIONS
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Rows, drawn at random [default: all].", rich_help_panel=QUESTIONS)
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the rows drawn.", rich_help_panel=QUESTIONS)] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.", rich_help_panel=GENERATION)] = 32,
    calibration: CalibrationOpt = None,
    images: ImagesOpt = None,
    samples: SamplesOpt = None,
    quantize: QuantizeOpt = None,
    quantize_head: QuantizeHeadOpt = None,
    quantize_vision: QuantizeVisionOpt = None,
    auto_precision: AutoPrecisionOpt = False,
    min_pixels: MinPixelsOpt = None,
    max_pixels: MaxPixelsOpt = None,
    provider: ProviderOpt = "cpu",
    workers: WorkersOpt = None,
    ray: RayOpt = None,
    verify_key: VerifyKeyOpt = None,
    trust_remote_code: TrustOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Compare methods with the dense model on questions."""
    bundle = None if source is None or _is_checkpoint(Path(source).expanduser()) else Path(source)
    own = (model, checkpoint, revision, calibration, images, samples, auto_precision)
    own += (quantize, quantize_head, quantize_vision)
    if bundle is not None and any(own):
        raise CapaError(
            "a bundle runs as it is: --model, --checkpoint, --revision, --calibration, --images, --samples, "
            "--quantize, --quantize-head, --quantize-vision and --auto-precision are for a checkpoint",
            ExitCode.USAGE,
        )
    if bundle is None and provider != "cpu":
        raise CapaError(
            f"--provider {provider}: a checkpoint is asked as it is in PyTorch; build it, and evaluate the bundle",
            ExitCode.USAGE,
        )
    if bundle is None and verify_key is not None:
        raise CapaError("--verify-key: a checkpoint is not signed; build it, and evaluate the bundle", ExitCode.USAGE)
    if method and (selector or layer or ratio or ffn):
        raise CapaError("--method says it all: it takes no --selector, --layer, --ratio or --ffn", ExitCode.USAGE)
    from capa_export.api import studies
    from capa_export.api.bundle import Bundle
    from capa_export.api.models import find_recipe_of
    from capa_export.base.progress import progress
    from capa_export.config.recipe import recipe_of
    from capa_export.study.evaluate.models import product_of_methods
    from capa_export.study.evaluate.stage import MAX_SKIPPED

    opened = None if bundle is None else Bundle(bundle, verify_key=verify_key)
    named = one_checkpoint(source, checkpoint)
    methods = method or []
    if selector or layer or ratio or ffn:
        recipe = recipe_of(opened.manifest, opened.folder) if opened else find_recipe_of(named, model, revision)
        methods = product_of_methods(recipe, selector or [], layer or [], ratio or [], ffn or [])
    asked: dict[str, Any] = {
        "methods": methods,
        "benchmark": benchmark,
        "split": split,
        "instruction": instruction,
        "limit": limit,
        "seed": seed,
        "max_new_tokens": max_new_tokens,
        "min_pixels": min_pixels,
        "max_pixels": max_pixels,
        "workers": workers,
        "ray": ray,
        "trust_remote_code": trust_remote_code,
    }
    with progress() as report:
        if opened is not None:
            found = opened.evaluate(data, out=out, provider=provider, **asked, progress=report)
        else:
            found = studies.evaluate(
                named,
                data=data,
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
                **asked,
                progress=report,
            )
    if as_json:
        print_result(found)
    else:
        from capa_export.study.evaluate.table import evaluation_table

        evaluation_table(found)
    rows = found.questions + len(found.skipped)
    if found.skipped:
        first = "; ".join(f"row {entry.row}: {entry.reason}" for entry in found.skipped[:3])
        words = f"{data}: {len(found.skipped)} of {rows} rows were skipped: {first}"
        if len(found.skipped) > MAX_SKIPPED * rows:
            raise CapaError(f"{words}; repair the data, since more than 1 % makes the figures another benchmark's")
        say(f"warning: {words}")


def _is_checkpoint(folder: Path) -> bool:
    """Whether an argument means a checkpoint; what is no folder is looked for on the hub."""
    return not folder.is_dir() or (folder / "config.json").is_file()
