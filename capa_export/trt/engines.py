"""Engines of graphs, built by way of a kit on this machine."""

import os
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from capa_export.base.errors import CapaError, ExitCode
from capa_export.base.workers import module_arguments
from capa_export.config.plugins import NO_PLUGINS, Plugins
from capa_export.config.target import Target
from capa_export.config.weights import Weights
from capa_export.kernels.plugins.alias import ensure_parser_library
from capa_export.trt import builder
from capa_export.trt.graphs import served_graphs, write_graphs
from capa_export.trt.kit_file import KIT, KitError, read_kit
from capa_export.trt.layers import read_engine

__all__ = ["CHECKER", "WORKER", "build_graphs", "building_environment", "read_engines"]

WORKER = module_arguments("capa_export.trt.worker")
"""Arguments of Python that start the process which builds an engine."""
CHECKER = module_arguments("capa_export.trt.golden_run")
"""The same of the process that holds a kit's engines against its golden."""


def build_graphs(
    onnx: Path,
    graphs: Mapping[str, str],
    folder: Path,
    target: Target,
    *,
    weights: Weights,
    plugins: Plugins = NO_PLUGINS,
    home: Path | None = None,
    logs: Mapping[str, Path] = {},
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, dict[str, Any]]:
    """Build the engines of graphs by way of a kit; its graphs go, its engines stay.

    Args:
        onnx: folder of the graphs.
        graphs: name of the engine of each graph; prefill and decode may have one, which is then both.
        folder: the kit, which must not exist yet. Of every engine it gets `NAME.engine`, `NAME.layers.json`,
            `NAME.log` and, with external weights, `NAME.weights.json`.
        target: the device; supplies the limits of every dimension.
        weights: whether the large weights are in the engines, or inputs of the networks.
        plugins: what computes the CAPA nodes.
        home: where the engines will be used, if the caller moves them: what `NAME.weights.json` is relative to.
        logs: by engine where its log lies until the engine is whole, if that is elsewhere.
        say: told what is being done.

    Returns:
        By engine what the manifest says of it.

    Raises:
        CapaError: the target is not possible, a graph is damaged, or TensorRT refused or crashed.
    """
    write_graphs(onnx, graphs, folder, target, weights=weights, plugins=plugins.kind, home=home)
    try:
        with building_environment() as environment:
            built = builder.build_engines(
                folder,
                read_kit(folder),
                folder,
                worker=WORKER,
                library=plugins.library,
                environment=environment,
                logs=logs,
                say=say,
            )
            engines = read_engines(built, folder)
    except KeyboardInterrupt:
        for log in logs.values():
            log.unlink(missing_ok=True)
        raise
    for name in (KIT, *(served[0] for served in served_graphs(graphs).values())):
        (folder / name).unlink()
    return engines


@contextmanager
def building_environment() -> Generator[Mapping[str, str]]:
    """Variables of the building processes."""
    # Kernels run for real there, even where this process interprets them.
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with TemporaryDirectory() as links:
        yield inherited | ensure_parser_library(Path(links))


def read_engines(built: Iterable[tuple[str, dict[str, Any]]], kit: Path) -> dict[str, dict[str, Any]]:
    """What the manifest says of the engines that a builder makes; each is read when it is whole."""
    try:
        return {name: read_engine(said["plan"], said, kit / f"{name}.weights.json") for name, said in built}
    except KitError as error:
        raise CapaError(str(error), ExitCode.ENGINE) from error
