"""Prepares graphs for a builder: as TensorRT reads them, with the limits of every input, and what `kit.json` says."""

import json
import os
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, Literal

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
from capa_export.passes.join_decode import JoinDecodePass
from capa_export.trt.kit_file import KIT, VERSION

__all__ = [
    "GRAPHS",
    "JOINED",
    "find_profiles",
    "served_graphs",
    "write_graphs",
    "write_manifest",
    "write_weights",
]

GRAPHS = {"visual/model.onnx": "visual/visual", "llm/prefill.onnx": "llm/prefill", "llm/decode.onnx": "llm/decode"}
"""Engine of each graph."""
JOINED = {**GRAPHS, "llm/prefill.onnx": "llm/decoder", "llm/decode.onnx": "llm/decoder"}
"""The same where one engine is both, and holds their weights once."""

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
        graphs: name of the engine of each graph; prefill and decode may have one, which is then both.
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
    for name, served in served_graphs(graphs).items():
        graph = served[0]
        source, place = onnx / graph, kit / graph
        profiles = find_profiles(onnx, served, target)
        place.parent.mkdir(parents=True, exist_ok=True)
        prepared = prepare(
            *(source, place),
            joined=len(served) > 1,
            external_weights=weights == "external",
            plugins=plugins != "none",
        )
        if weights == "external":
            write_weights(kit / f"{name}.weights.json", source, (home or kit) / name, prepared.weights)
        engines[name] = {
            "onnx": graph,
            "source": str(source),
            "capa_nodes": prepared.num_nodes,
            "plugins": prepared.num_plugins,
            "profiles": profiles,
        }
    write_manifest(kit, target, weights=weights, plugins=plugins, engines=engines, files={}, golden=None)


def served_graphs(graphs: Mapping[str, str]) -> dict[str, list[str]]:
    """The graphs that each engine serves, by a profile each; it is made of the first."""
    served: dict[str, list[str]] = {}
    for graph, engine in graphs.items():
        served.setdefault(engine, []).append(graph)
    return served


def find_profiles(onnx: Path, served: Sequence[str], target: Target) -> dict[str, dict[str, Any]]:
    """Limits of each profile of an engine, by the graph that it serves.

    `shapes` are the smallest, usual and largest shape of every input, `shape_inputs` the same of the values of those
    which are sizes. Of an engine that is both, prefill runs behind one block of a cache, and decode is a prompt of one
    token, which is text.

    Args:
        onnx: folder of the graphs.
        served: the graphs, that which the engine is made of first.
        target: the device.

    Raises:
        CapaError: a graph cannot be read, its weights are missing, or the target has no limits for a dimension.
    """
    model = _read(onnx / served[0])
    if len(served) > 1:
        JoinDecodePass()(model)
    inputs = {value.name for value in model.graph.inputs}
    shapes = {name: shape for name, shape in step_shapes(model.graph).items() if name in inputs}
    values = target.require_engine().values
    none = dict.fromkeys(values, DimRange(min=0, opt=0, max=0))
    joined = len(served) > 1
    return {
        graph: {
            "shapes": {
                name: _ends([_limits(size, target, whose if joined else "any") for size in shape])
                for name, shape in shapes.items()
            },
            "shape_inputs": {
                name: _ends([(none if joined and whose == "token" else values)[name]] * prod(map(int, shape)))
                for name, shape in shapes.items()
                if name in values
            },
        }
        for graph, whose in zip(served, ("prompt", "token"), strict=False)
    }


def _limits(size: int | str, target: Target, whose: Literal["any", "prompt", "token"]) -> DimRange:
    """Limits of a dimension: of an engine's only graph, or of a prompt or a token in one that is prefill and decode."""
    rows = counted_in_blocks(size) if isinstance(size, str) else None
    if isinstance(size, str) and whose == ("token" if rows is None else "prompt"):
        size = 1
    if isinstance(size, int):
        return DimRange(min=size, opt=size, max=size)
    if rows is None:
        return target.dim(size)
    least, usual, most = (-(-count // CACHE_ROWS) for count in target.dim(rows).model_dump().values())
    return DimRange(min=least, opt=usual, max=most)


def _read(onnx: Path) -> ir.Model:
    try:
        model = ir.load(onnx)
    except Exception as error:
        raise CapaError(f"{onnx}: cannot be read as ONNX: {error}", ExitCode.ENGINE) from error
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor) and not Path(value.const_value.path).is_file():
            raise CapaError(f"{onnx}: its weights are missing: {value.const_value.path}", ExitCode.ENGINE)
    return model


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
