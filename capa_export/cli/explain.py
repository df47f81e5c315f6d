"""The command that shows what every selector makes of a picture."""

from pathlib import Path
from typing import Annotated

import typer

from capa_export.base.errors import CapaError, ExitCode
from capa_export.cli.options import (
    GENERATION,
    OUTPUT,
    PRUNING,
    QUESTIONS,
    BundleArg,
    CheckpointOpt,
    JsonOpt,
    MaxPixelsOpt,
    MinPixelsOpt,
    RevisionOpt,
    TrustOpt,
    VerifyKeyOpt,
)
from capa_export.cli.results import print_result

__all__ = ["explain"]


def explain(
    bundle: BundleArg,
    prompt: Annotated[str, typer.Option(help="The question.", rich_help_panel=QUESTIONS)],
    image: Annotated[
        list[Path], typer.Option(help="A picture; may be given several times.", rich_help_panel=QUESTIONS)
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="HTML file [default: explain.html in BUNDLE].", rich_help_panel=OUTPUT),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="As `evaluate` takes it, beside dense and the bundle's own; may be given several times [default: "
            "every selector at the bundle's ratio].",
            rich_help_panel=PRUNING,
        ),
    ] = None,
    layer: Annotated[
        int | None,
        typer.Option(min=0, help="Layer that is looked at [default: the bundle's first].", rich_help_panel=PRUNING),
    ] = None,
    min_pixels: MinPixelsOpt = None,
    max_pixels: MaxPixelsOpt = None,
    checkpoint: CheckpointOpt = None,
    revision: RevisionOpt = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.", rich_help_panel=GENERATION)] = 64,
    verify_key: VerifyKeyOpt = None,
    trust_remote_code: TrustOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Draw what each selector keeps of a picture, as an HTML page. It shows what CAPA sees, and the answers, too."""
    page = bundle / "explain.html" if out is None else out
    if page.is_dir():
        raise CapaError(f"--out {page}: is a folder; name the HTML file in it", ExitCode.USAGE)
    from capa_export.api.bundle import Bundle
    from capa_export.base.progress import progress

    opened = Bundle(bundle, verify_key=verify_key)
    if not page.parent.is_dir():
        raise CapaError(f"--out {page}: there is no folder {page.parent}; make it first", ExitCode.USAGE)
    with progress() as report:
        try:
            found = opened.explain(
                prompt,
                image,
                page=page,
                methods=method or [],
                layer=layer,
                checkpoint=checkpoint,
                revision=revision,
                min_pixels=min_pixels,
                max_pixels=max_pixels,
                max_new_tokens=max_new_tokens,
                trust_remote_code=trust_remote_code,
                progress=report,
            )
        except OSError as error:
            raise CapaError(f"{page}: {error.strerror}; choose another --out") from error
    if as_json:
        print_result(found)
    else:
        print(page)
