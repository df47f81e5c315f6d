"""The commands `capa-export plugins ...`: the library that computes the CAPA nodes without Python."""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from capa_export.cli.command import Command
from capa_export.cli.examples import epilog
from capa_export.cli.options import ENGINE, OUTPUT, JsonOpt
from capa_export.cli.results import print_json

__all__ = ["plugins"]

plugins = typer.Typer(help="Make the TensorRT plugins of the CAPA nodes.", no_args_is_help=True)


@plugins.callback()
def _group() -> None:  # pyright: ignore[reportUnusedFunction]  # It keeps `build` a command of its own.
    pass


@plugins.command(cls=Command, epilog=epilog("plugins build"))
def build(
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            help="Library (.so) to write, or folder to put it in [default: this one].",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = Path(),
    tensorrt_include: Annotated[
        Path | None,
        typer.Option(
            help="Folder of TensorRT's headers, 10.3 to 11 [default: where packages put them].", rich_help_panel=ENGINE
        ),
    ] = None,
    arch: Annotated[
        str | None, typer.Option(help="CPU: x86_64 or aarch64 [default: this machine's].", rich_help_panel=ENGINE)
    ] = None,
    cxx: Annotated[
        str | None, typer.Option(help="C++ compiler [default: g++ for the CPU].", rich_help_panel=ENGINE)
    ] = None,
    compute_capabilities: Annotated[
        str | None,
        typer.Option(help="GPUs to hold kernels for, such as 8.7,11.0 [default: all].", rich_help_panel=ENGINE),
    ] = None,
    as_json: JsonOpt = False,
) -> None:
    """Compile the kernels and the plugin library around them. No GPU and no CUDA toolkit is needed."""
    from capa_export.base.progress import progress
    from capa_export.kernels import require_triton

    require_triton()
    from capa_export.kernels.compile import COMPUTE_CAPABILITIES
    from capa_export.kernels.plugins.native import build_library

    with progress() as report:
        library = build_library(
            out,
            compute_capabilities=[one.strip() for one in compute_capabilities.split(",") if one.strip()]
            if compute_capabilities
            else COMPUTE_CAPABILITIES,
            tensorrt_include=tensorrt_include,
            arch=arch,
            cxx=cxx,
            progress=partial(report, "kernels"),
        )
    if as_json:
        print_json(asdict(library))
    else:
        print(
            f"{library.path}: {library.bytes / 1e6:.1f} MB for {library.arch}, TensorRT {library.tensorrt}, "
            f"compute capabilities {', '.join(library.compute_capabilities)} and PTX"
        )
