"""Prepares graphs for a builder: as TensorRT reads them, with the limits of every input, and what `kit.json` says."""

import json
import os
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import onnx_ir as ir

import capa_export
from capa_export.base.errors import CapaError, ExitCode, how_to_install
from capa_export.bundle.store import digest_of
from capa_export.config.plugins import PluginKind
from capa_export.config.target import DimRange, Target
from capa_export.config.weights import Weights
from capa_export.graph.contract import CACHE_ROWS, counted_in_blocks
from capa_export.passes.cache_blocks import step_shapes
from capa_export.passes.for_tensorrt import prepare
from capa_export.trt.kit_file import KIT, VERSION

__all__ = ["GRAPHS", "find_limits", "write_graphs", "write_manifest", "write_weights"]

GRAPHS = {"visual/model.onnx": "visual/visual", "llm/prefill.onnx": "llm/prefill", "llm/decode.onnx": "llm/decode"}
"""Engine of each graph."""

_INSTALL = {
    "tensorrt-rtx": how_to_install("rtx"),
    "tensorrt": "it comes with JetPack, as python3-libnvinfer, or with pip install tensorrt",
}


def write_graphs(
    onnx: Path,
    graphs: Mapping[str, str],
    kit: Path,
    target: Target,
    *,
    weights: Weights,
    plugins: PluginKind,
    home: Path | None = None,
) -> None:
    """Write a kit that is built where it lies; its graphs find their weights where the shipped ones do.

    Args:
        onnx: folder of the graphs.
        graphs: name of the engine of each graph.
        kit: the folder, which must not exist yet.
        target: the device; supplies the limits of every dimension.
        weights: whether the large weights are in the engines, or inputs of the networks.
        plugins: what computes the CAPA nodes.
        home: where the engines will be used, if the kit moves: what `NAME.weights.json` is relative to.

    Raises:
        CapaError: the target is not possible, or a graph is damaged, lacks its weights or takes no plugins.
    """
    target.require_engine()
    kit.mkdir(parents=True)
    engines: dict[str, Any] = {}
    for graph, name in graphs.items():
        source, place = onnx / graph, kit / graph
        limits = find_limits(source, target)
        place.parent.mkdir(parents=True, exist_ok=True)
        prepared = prepare(source, place, external_weights=weights == "external", plugins=plugins != "none")
        if weights == "external":
            write_weights(kit / f"{name}.weights.json", source, (home or kit) / name, prepared.weights)
        engines[name] = {
            "onnx": graph,
            "source": str(source),
            "capa_nodes": prepared.num_nodes,
            "plugins": prepared.num_plugins,
            **limits,
        }
    write_manifest(kit, target, weights=weights, plugins=plugins, engines=engines, files={}, golden=None)


def find_limits(onnx: Path, target: Target) -> dict[str, dict[str, list[list[int]]]]:
    """Smallest, usual and largest shape of every input, and the same of the values of those which are sizes.

    Raises:
        CapaError: the graph cannot be read, its weights are missing, or the target has no limits for a dimension.
    """
    try:
        graph = ir.load(onnx).graph
    except Exception as error:
        raise CapaError(f"{onnx}: cannot be read as ONNX: {error}", ExitCode.ENGINE) from error
    for value in graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor) and not Path(value.const_value.path).is_file():
            raise CapaError(f"{onnx}: its weights are missing: {value.const_value.path}", ExitCode.ENGINE)

    def limits(size: int | str) -> DimRange:
        if isinstance(size, int):
            return DimRange(min=size, opt=size, max=size)
        rows = counted_in_blocks(size)
        if rows is None:
            return target.dim(size)
        least, usual, most = (-(-count // CACHE_ROWS) for count in target.dim(rows).model_dump().values())
        return DimRange(min=least, opt=usual, max=most)

    inputs = {value.name for value in graph.inputs}
    shapes = {name: shape for name, shape in step_shapes(graph).items() if name in inputs}
    values = target.require_engine().values
    return {
        "shapes": {name: _ends([limits(size) for size in shape]) for name, shape in shapes.items()},
        "shape_inputs": {
            name: _ends([values[name]] * prod(map(int, shape))) for name, shape in shapes.items() if name in values
        },
    }


def _ends(ranges: Sequence[DimRange]) -> list[list[int]]:
    return [[one.min for one in ranges], [one.opt for one in ranges], [one.max for one in ranges]]


def write_weights(path: Path, onnx: Path, engine: Path, weights: Sequence[Mapping[str, Any]]) -> None:
    """Write where a runtime finds the bytes of every weight input; files are relative to the folder of the engine."""
    entries: dict[str, dict[str, Any]] = {}
    for weight in weights:
        entry = dict(weight)
        data = (onnx.parent / entry.pop("location")).resolve()
        name = entry.pop("name")
        entries[name] = {"file": Path(os.path.relpath(data, engine.parent.resolve())).as_posix(), **entry}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")


def write_manifest(kit: Path, target: Target, **said: Any) -> None:
    """Write `kit.json`, which holds a digest of itself."""
    settings = target.require_engine()
    manifest = {
        "version": VERSION,
        "tool": f"capa-export {capa_export.__version__}",
        "target": target.name,
        "runtime": settings.runtime.replace("-", "_"),
        "install": _INSTALL[settings.runtime],
        **settings.model_dump(include={"compute_capabilities", "version_min", "version_below"}, mode="json"),
        **said,
    }
    text = json.dumps({**manifest, "digest": digest_of(manifest)}, indent=1) + "\n"
    (kit / KIT).write_text(text, encoding="utf-8")
