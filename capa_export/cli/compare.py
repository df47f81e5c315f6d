"""The command that holds one bundle against another."""

from pathlib import Path
from typing import Annotated

import typer

from capa_export.base.errors import CapaError, ExitCode
from capa_export.cli.options import VALIDATION, ImagesOpt, JsonOpt, TrustOpt, VerifyKeyOpt
from capa_export.cli.results import print_result

__all__ = ["compare"]


def compare(
    reference: Annotated[Path, typer.Argument(help="Bundle folder: what is deployed.")],
    candidate: Annotated[Path, typer.Argument(help="Bundle folder: what is to take its place.")],
    images: ImagesOpt = None,
    samples: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="How many to ask about [default: a bundle's golden samples, or else 8].",
            rich_help_panel=VALIDATION,
        ),
    ] = None,
    gate: Annotated[
        Path | None,
        typer.Option(help="TOML file with a table [compare]: what may be lost.", rich_help_panel=VALIDATION),
    ] = None,
    verify_key: VerifyKeyOpt = None,
    trust_remote_code: TrustOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Say what changed between two bundles. Recipe, kept tokens, logits, answers, speed; exit code 6: a regression."""
    from capa_export.api.bundle import Bundle
    from capa_export.base.progress import progress

    with progress() as report:
        found = Bundle(reference, verify_key=verify_key).compare(
            candidate, images=images, samples=samples, gate=gate, trust_remote_code=trust_remote_code, progress=report
        )
    if as_json:
        print_result(found)
    else:
        from capa_export.study.compare.table import compare_table

        compare_table(found)
    if not found.passed:
        raise CapaError(found.failures[0], ExitCode.PARITY)
