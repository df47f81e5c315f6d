"""How commands end: what they print for programs and for people, and the exit code of a verdict."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capa_export.base.errors import CapaError, ExitCode

if TYPE_CHECKING:
    from pydantic import BaseModel

    from capa_export.api.bundle import Bundle
    from capa_export.report.schema import ParityReport

__all__ = ["finish", "print_json", "print_result"]


def print_json(value: Any) -> None:
    """A result, for programs."""
    print(json.dumps(value, indent=2, default=str))


def print_result(found: "BaseModel") -> None:
    """A study's result, for programs; like all JSON here it is ASCII, which steers no terminal."""
    print_json(json.loads(found.model_dump_json()))


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
        from capa_export.report.terminal import print_parity

        print_parity(parity)
    if not parity.passed:
        raise CapaError(f"{bundle.folder}: {parity.failures[0]}; see {bundle.folder / 'parity.json'}", ExitCode.PARITY)
    if not parity.fit and parity.answers is not None:
        raise CapaError(
            f"{bundle.folder}: answers {parity.answers.words}; prune less or later (`capa-export tune` finds where), "
            "lower --ffn-budget, or ship it all the same with --accept-method-loss",
            ExitCode.METHOD,
        )
