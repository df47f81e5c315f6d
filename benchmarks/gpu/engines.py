"""Engines of the same checkpoint: built for this GPU, held against ONNX Runtime, then prefill and decode timed."""

import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any, Literal

from cases import Case, skip
from reference import PARITY_RATIO, ReferenceGraphs, feed, figures, trace
from timing import wall_milliseconds
from workload import NUM_VISUAL, prompt

from capa_export.base.errors import CapaError
from capa_export.config.plugins import PluginKind, Plugins
from capa_export.config.schedule import kept_tokens
from capa_export.config.target import Target, load_target, version_parts
from capa_export.config.weights import Weights
from capa_export.export.graphs import DENSE
from capa_export.kernels.cuda import require_gpu
from capa_export.kernels.plugins.native import build_library
from capa_export.passes.lower import NATIVE
from capa_export.run.decoding import TokenRule
from capa_export.run.engine import BuiltEngines
from capa_export.run.engine_model import DeviceCache, EngineModel
from capa_export.run.runtime import PrefillRun
from capa_export.trt.engines import build_graphs
from capa_export.trt.graphs import GRAPHS, JOINED, served_graphs

__all__ = ["NATIVE_VARIANTS", "VARIANTS", "Variant", "cases", "target_for"]

_RATIOS = (0.5, 0.75, 0.9)
_TARGETS = {"tensorrt-rtx": "rtx", "tensorrt": "h100"}
"""Whose limits hold; the GPU is the one that is here."""
_ROUNDS, _STEPS, _WARM_UP = 10, 40, 8


@dataclass(frozen=True)
class Variant:
    """A way to build the engines."""

    plugins: PluginKind
    weights: Weights
    dense: bool = False
    """Prefill with full FFNs; it is told to keep all."""

    @property
    def name(self) -> str:
        return f"plugins {self.plugins}, weights {self.weights}{', dense' if self.dense else ''}"

    @property
    def ratios(self) -> tuple[float, ...]:
        return (0.0,) if self.dense else _RATIOS

    @property
    def engines(self) -> Mapping[str, str]:
        """Engine of each graph."""
        return JOINED if self.weights == "joined" else GRAPHS

    @property
    def files(self) -> dict[str, str]:
        """Engine of each ONNX file that it is built from."""
        dense = {"llm/prefill.onnx": f"llm/{DENSE}"} if self.dense else {}
        return {dense.get(graph, graph): engine for graph, engine in self.engines.items()}


VARIANTS = (
    Variant("python", "embedded"),
    Variant("none", "embedded", dense=True),
    Variant("none", "embedded"),
    Variant("python", "external"),
    Variant("none", "external", dense=True),
    Variant("none", "external"),
    Variant("none", "joined"),
)
NATIVE_VARIANTS = (Variant("native", "embedded"),)
"""Apart: these plugins have the names of those in Python, and a process knows one of a name."""


def cases(work: Path, runtime: Literal["tensorrt-rtx", "tensorrt"], variants: tuple[Variant, ...]) -> Iterator[Case]:
    """Engines of one runtime, one variant after the other."""
    try:
        gpu = require_gpu()
        target = target_for(runtime, gpu.compute_capability)
    except CapaError as error:
        yield runtime, partial(skip, str(error))
        return
    graphs, trt = ReferenceGraphs(work), import_module(runtime.replace("-", "_"))
    for variant in variants:
        folder = work / "engines" / runtime / variant.name.replace(", ", "-").replace(" ", "-")
        built: list[EngineModel] = []

        def build(
            variant: Variant = variant, folder: Path = folder, built: list[EngineModel] = built
        ) -> dict[str, Any]:
            try:
                plugins = _plugins(variant.plugins, gpu.compute_capability, work)
            except CapaError as error:
                skip(str(error))
            costs = _build(graphs.folder, folder, target, variant, plugins)
            record = {"kind": plugins.kind, "library_sha256": None}
            served = served_graphs(variant.engines).items()
            serving = {graph: (name, profile) for name, own in served for profile, graph in enumerate(own)}
            engines = BuiltEngines(folder=folder, onnx=graphs.folder, serving=serving, plugins=record, trt=trt, gpu=gpu)
            built.append(EngineModel(engines))
            return costs

        name = f"{runtime}, {variant.name}"
        yield f"{name}: build", build
        if built:
            yield from _measured(name, graphs, variant, built.pop())


def target_for(runtime: Literal["tensorrt-rtx", "tensorrt"], capability: str) -> Target:
    """A target of this GPU alone.

    Raises:
        CapaError: the runtime is not installed, or does not take our graphs for this GPU.
    """
    module = runtime.replace("-", "_")
    if find_spec(module) is None:
        raise CapaError(f"{runtime} is not installed")
    shipped = load_target(_TARGETS[runtime])
    # TensorRT builds for the GPU that it finds, and takes no name of one.
    names = (capability,) if runtime == "tensorrt-rtx" else ()
    engine = shipped.require_engine().model_copy(update={"compute_capabilities": names})
    target = shipped.model_copy(update={"name": "this GPU", "engine": engine})
    target.require_engine()
    if runtime == "tensorrt" and version_parts(version := import_module(module).__version__) < NATIVE:
        raise CapaError(f"tensorrt {version} needs lowered graphs, which only a kit has; 10.15 does not")
    return target


def _plugins(kind: PluginKind, capability: str, work: Path) -> Plugins:
    library = None
    if kind == "native":
        include = os.environ.get("TENSORRT_INCLUDE")
        if not include or shutil.which(os.environ.get("CXX", "g++")) is None:
            raise CapaError("needs TENSORRT_INCLUDE, the folder of TensorRT's headers, and g++")
        library = build_library(work, compute_capabilities=[capability], tensorrt_include=Path(include)).path
    return Plugins(kind, library)


def _build(onnx: Path, folder: Path, target: Target, variant: Variant, plugins: Plugins) -> dict[str, Any]:
    """The engines of a variant; those without CAPA nodes are links to a first variant's with the same weights."""
    costs: dict[str, Any] = {}
    prefill = variant.engines["llm/prefill.onnx"]
    others = sorted({*variant.engines.values()} - {prefill})
    for home, names in (folder, [prefill]), (folder.with_name(variant.weights), others):
        if not all((home / f"{name}.engine").exists() for name in names):
            shutil.rmtree(home, ignore_errors=True)
            graphs = {graph: name for graph, name in variant.files.items() if name in names}
            built = build_graphs(onnx, graphs, home, target, weights=variant.weights, plugins=plugins)
            for name, engine in built.items():
                costs[f"{name}_s"], costs[f"{name}_MB"] = engine["seconds"], engine["bytes"] / 1e6
        for source in (source for name in names for source in home.glob(f"{name}.*")):
            place = folder / source.relative_to(home)
            place.parent.mkdir(parents=True, exist_ok=True)
            if not place.exists():
                os.link(source, place)
    return costs


def _measured(name: str, graphs: ReferenceGraphs, variant: Variant, model: EngineModel) -> Iterator[Case]:
    given, embeds = prompt(), feed(model)

    def parity() -> dict[str, float]:
        reference = graphs.reference(dense=variant.dense)
        keep = kept_tokens(NUM_VISUAL, 0 if variant.dense else PARITY_RATIO)
        return figures(trace(model, keep, reference.tokens), reference)

    def prefill(keep: int) -> dict[str, float]:
        return {"ms": wall_milliseconds(lambda: model.prefill(given, [keep], embeds), _ROUNDS)}

    def decode(keep: int, *, graph: bool = True, chosen: bool = False) -> dict[str, float]:
        model.captures = graph
        steps, seconds = _steps(model, model.prefill(given, [keep], embeds), chosen=chosen), list[float]()
        for _ in range(_STEPS - 1):
            started = time.perf_counter()
            next(steps)
            seconds.append(time.perf_counter() - started)
        if graph and not model.captures:
            raise AssertionError("a step was not captured")
        memory = {f"{part}_MB": num_bytes / 1e6 for part, num_bytes in model.memory.items()}
        return {"ms": 1e3 * median(seconds[_WARM_UP:]), **memory}

    yield f"{name}: against ONNX Runtime", parity
    for ratio in variant.ratios:
        keep = kept_tokens(NUM_VISUAL, ratio)
        removed = f"ratio {ratio:g}"
        yield f"{name}: prefill, {removed}", partial(prefill, keep)
        yield f"{name}: decode, {removed}", partial(decode, keep, graph=False)
        yield f"{name}: decode, {removed}, CUDA graph", partial(decode, keep)
        yield f"{name}: decode, {removed}, CUDA graph, tokens chosen on the GPU", partial(decode, keep, chosen=True)


def _steps(model: EngineModel, run: PrefillRun[DeviceCache], *, chosen: bool) -> Iterator[object]:
    """Steps behind a prefill: of tokens that the device chooses, or of those that the host brings."""
    cache, position = model.batch([run.cache], _STEPS), prompt().next_position
    if chosen:
        said = model.choose(cache, run.logits[None], [TokenRule()], [position])
        if said is None:
            skip("tokens are chosen on the host")
        # What the prompt itself is answered with takes no step.
        next(said)
        yield from said
    for step in count():
        logits, cache = model.append(cache, [[0]], [position + step])
        yield logits
