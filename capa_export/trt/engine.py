"""Builds TensorRT engines from ONNX files, each in a process of its own, and reads what came out."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import onnx_ir as ir

from capa_export.base.errors import CapaError, ExitCode, how_to_install
from capa_export.config.plugins import NO_PLUGINS, Plugins
from capa_export.config.target import DimRange, ShapeRange, Target
from capa_export.config.weights import Weights
from capa_export.kernels.plugins.alias import ensure_parser_library
from capa_export.passes.external_weights import MIN_WEIGHT_BYTES
from capa_export.passes.for_tensorrt import prepare

__all__ = [
    "EngineReport",
    "Layer",
    "Progress",
    "Tensor",
    "build_engine",
    "input_shapes",
    "parse_layers",
    "weight_copies",
    "weight_entries",
]

Progress = Callable[[float], None]
"""Called a few times a second with the seconds since the build began."""

_POLL_SECONDS = 0.2
_ITEM_BYTES = {"Float": 4, "Half": 2, "BFloat16": 2, "Int64": 8, "Int32": 4, "Bool": 1, "UInt8": 1, "Int8": 1, "FP8": 1}

_INSTALL = {
    "tensorrt_rtx": how_to_install("rtx"),
    "tensorrt": "it comes with JetPack, as python3-libnvinfer, or with pip install tensorrt",
}

# Said of every int64 input and output, and of every second call of the same ONNX function.
_NO_NEWS = re.compile(r"has Int64 binding|A node named \S+ already exists")


@dataclass(frozen=True, slots=True)
class Tensor:
    """An input, constant or output of a fused layer."""

    name: str
    shape: tuple[int, ...]
    """-1 where the size is known at run time only."""
    dtype: str


@dataclass(frozen=True, slots=True)
class Layer:
    """One step of an engine, as TensorRT fused it."""

    name: str
    type: str
    inputs: tuple[Tensor, ...]
    constants: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    onnx: tuple[str, ...]
    """The ONNX nodes it stands for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineReport:
    """What a build produced and what it took."""

    path: Path
    bytes: int
    seconds: float
    peak_rss_bytes: int | None
    """Of the building process, memory-mapped weights included; None where the system does not tell."""
    runtime_version: str
    num_layers: int
    num_layers_by_type: dict[str, int]
    num_custom_layers: int
    """Layers that are plugin kernels."""
    weight_copies: tuple[str, ...]
    """Layers that copy, cast or transpose a whole weight each time the engine runs; none is how it should be."""
    num_external_weights: int
    activation_bytes: int | None
    """What its execution context takes at the largest shapes; None where the runtime does not say."""
    warnings: tuple[str, ...]
    log: Path
    layers: Path
    weights: Path | None
    """Where the bytes of the weight inputs lie; None if the weights are in the engine."""


def build_engine(
    onnx: Path,
    engine: Path,
    *,
    dims: Mapping[str, DimRange],
    shape_inputs: Mapping[str, ShapeRange],
    target: Target,
    weights: Weights,
    plugins: Plugins = NO_PLUGINS,
    progress: Progress | None = None,
    home: Path | None = None,
    log: Path | None = None,
) -> EngineReport:
    """Build `engine` from `onnx`, with `<name>.layers.json`, `<name>.log` and maybe `<name>.weights.json` beside it.

    Args:
        onnx: The graph; its external data is looked for beside it.
        engine: The plan to write. Nothing but the log changes unless the build succeeds.
        dims: Limits of symbolic dimensions of this graph that differ from the target's.
        shape_inputs: Limits of the inputs whose values are sizes.
        target: The device; supplies the limits of the other dimensions.
        weights: Whether the large weights are in the plan, or inputs of the network.
        plugins: What computes the CAPA nodes, if not their bodies.
        progress: Told how long the build has been running.
        home: Folder the engine will be used from, if the caller moves it: what `<name>.weights.json` is relative to.
        log: Where the log goes, if not beside the engine.

    Raises:
        CapaError: the target is not possible, or TensorRT refused or crashed.
    """
    settings = target.require_engine()
    shapes = input_shapes(onnx, dims, shape_inputs, target)
    engine.parent.mkdir(parents=True, exist_ok=True)
    log = log or engine.with_suffix(".log")
    layers_path, weights_path = engine.with_suffix(".layers.json"), engine.with_suffix(".weights.json")
    scratch = Path(tempfile.mkdtemp(prefix=f".{engine.stem}.", dir=engine.parent))
    try:
        prepared = prepare(
            onnx, scratch / "model.onnx", external_weights=weights == "external", plugins=plugins.kind != "none"
        )
        spec: dict[str, Any] = {
            "runtime": settings.runtime.replace("-", "_"),
            "onnx": str(scratch / "model.onnx"),
            "beside": str(onnx.resolve()),
            "plan": str(scratch / "plan"),
            "layers": str(scratch / "layers.txt"),
            "result": str(scratch / "result.json"),
            "plugins": {
                "kind": plugins.kind,
                "library": plugins.library and str(plugins.library),
                "count": prepared.num_plugins,
            },
            "shapes": shapes,
            "shape_inputs": {name: [limits.min, limits.opt, limits.max] for name, limits in shape_inputs.items()},
            **settings.model_dump(include={"compute_capabilities", "version_min", "version_below"}),
        }
        start = time.monotonic()
        result = _run_worker(onnx, spec, scratch, log, progress)
        seconds = time.monotonic() - start
        layers = parse_layers(Path(spec["layers"]).read_text(encoding="utf-8"))
        names = {weight["name"] for weight in prepared.weights}
        new = {layers_path: _write_json(scratch / "layers.json", [asdict(layer) for layer in layers])}
        if weights == "external":
            entries = weight_entries(onnx, home or engine.parent, prepared.weights)
            new[weights_path] = _write_json(scratch / "weights.json", entries)
        # The plan comes last: where it is, the rest is.
        new[engine] = Path(spec["plan"])
        for final, temporary in new.items():
            temporary.replace(final)
    finally:
        shutil.rmtree(scratch)
    if weights == "embedded":
        weights_path.unlink(missing_ok=True)
    types = Counter(layer.type for layer in layers)
    return EngineReport(
        path=engine,
        bytes=engine.stat().st_size,
        seconds=seconds,
        peak_rss_bytes=result["peak_rss_bytes"],
        runtime_version=result["version"],
        num_layers=len(layers),
        num_layers_by_type=dict(sorted(types.items())),
        num_custom_layers=types["custom_layer"],
        weight_copies=tuple(layer.name for layer in weight_copies(layers, names)),
        num_external_weights=len(names),
        activation_bytes=_activation_bytes(log),
        warnings=tuple(dict.fromkeys(warning for warning in result["warnings"] if not _NO_NEWS.search(warning))),
        log=log,
        layers=layers_path,
        weights=weights_path if weights == "external" else None,
    )


def _activation_bytes(log: Path) -> int | None:
    said = re.findall(r"Total Activation Memory: (\d+) bytes", log.read_text(encoding="utf-8", errors="replace"))
    return int(said[-1]) if said else None


def input_shapes(
    onnx: Path, dims: Mapping[str, DimRange], shape_inputs: Iterable[str], target: Target
) -> dict[str, list[list[int]]]:
    """Smallest, usual and largest shape of every input of the graph."""
    try:
        graph = ir.load(onnx).graph
    except Exception as error:
        raise CapaError(f"{onnx}: cannot be read as ONNX: {error}", ExitCode.ENGINE) from error
    inputs = {str(value.name): list(value.shape or ()) for value in graph.inputs}
    named = {str(size.value) for shape in inputs.values() for size in shape if isinstance(size, ir.SymbolicDim)}
    _refuse_foreign(onnx, "dimension", dims, named)
    _refuse_foreign(onnx, "input", shape_inputs, inputs)
    for value in graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor) and not Path(value.const_value.path).is_file():
            raise CapaError(f"{onnx}: its weights are missing: {value.const_value.path}", ExitCode.ENGINE)

    def limits(size: int | ir.SymbolicDim) -> DimRange:
        if isinstance(size, int):
            return DimRange(min=size, opt=size, max=size)
        return dims.get(str(size.value)) or target.dim(str(size.value))

    ranges = {name: [limits(size) for size in shape] for name, shape in inputs.items()}
    return {
        name: [[one.min for one in shape], [one.opt for one in shape], [one.max for one in shape]]
        for name, shape in ranges.items()
    }


def _refuse_foreign(onnx: Path, what: str, given: Iterable[str], known: Iterable[str]) -> None:
    if foreign := sorted(set(given) - set(known)):
        names = ", ".join(sorted(known)) or "none"
        raise CapaError(f"{onnx}: no {what} {foreign[0]}; its {what}s are: {names}", ExitCode.ENGINE)


def _run_worker(
    onnx: Path, spec: dict[str, Any], scratch: Path, log: Path, progress: Progress | None
) -> dict[str, Any]:
    spec_path = _write_json(scratch / "spec.json", spec)
    with log.open("wb") as output:
        start = time.monotonic()
        command = [sys.executable, "-m", "capa_export.trt.worker", str(spec_path)]
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=_environment(scratch)
        )
        try:
            while True:
                try:
                    child.wait(_POLL_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    if progress is not None:
                        progress(time.monotonic() - start)
        finally:
            # Reached with a live child when the user interrupts or `progress` raises.
            child.kill()
            child.wait()
    result_path = Path(spec["result"])
    if not result_path.exists():
        raise CapaError(f"{onnx}: {_crash(child.returncode, log)}; log: {log}", ExitCode.ENGINE)
    result = json.loads(result_path.read_text(encoding="utf-8"))
    if "error" in result:
        raise CapaError(f"{onnx}: {result['error']}; log: {log}", ExitCode.ENGINE)
    return result


def _environment(scratch: Path) -> dict[str, str]:
    """The worker's: kernels run for real there, even where this process interprets them."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return inherited | ensure_parser_library(scratch)


def _crash(returncode: int, log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    last = next((line for line in reversed(lines) if line), "it said nothing")
    if missing := re.match(r"(?:ModuleNotFound|Import)Error: .*\b(tensorrt\w*)", last):
        return f"{missing[1]} is not installed ({last}): {_INSTALL[missing[1]]}"
    if returncode < 0:
        name = signal.Signals(-returncode).name
        cause = ", most likely for want of memory" if -returncode == getattr(signal, "SIGKILL", None) else ""
        return f"the building process died of {name}{cause}: {last}"
    return f"the building process ended with status {returncode}: {last}"


def _write_json(path: Path, data: object) -> Path:
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return path


def weight_entries(onnx: Path, home: Path, weights: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Per network input where a runtime finds its bytes; the data file's path is relative to `home`."""
    entries: dict[str, dict[str, Any]] = {}
    for weight in weights:
        entry = dict(weight)
        data = (onnx.parent / entry.pop("location")).resolve()
        name = entry.pop("name")
        entries[name] = {"file": Path(os.path.relpath(data, home.resolve())).as_posix(), **entry}
    return entries


def parse_layers(text: str) -> list[Layer]:
    """The fused layers in TensorRT's verbose `Layers:` messages."""
    layers: list[Layer] = []
    for line in text.splitlines():
        head = re.match(r"Name: (.*?), LayerType: (\w+), ", line)
        if head is None:
            continue
        metadata = line.partition(", Metadata: ")[2]
        layers.append(
            Layer(
                name=head[1],
                type=head[2],
                inputs=tuple(_tensors(line, "Inputs")),
                constants=tuple(_tensors(line, "Constants")),
                outputs=tuple(_tensors(line, "Outputs")),
                onnx=tuple(re.findall(r"\[ONNX Layer: (.*?)\]", metadata)),
            )
        )
    return layers


def _tensors(line: str, part: str) -> Iterator[Tensor]:
    found = re.search(rf", {part}: \[ (\{{.*?\}})\]", line)
    for entry in re.findall(r"\{ (.*?)\}", found[1]) if found else ():
        name = re.match(r"Name: (.*?), [A-Z]", entry)
        shape = re.search(r"Dimensions: \[([-\d,]*)\]", entry)
        dtype = re.search(r"Datatype: (\w+)", entry)
        if name and shape and dtype:
            yield Tensor(name[1], tuple(int(size) for size in shape[1].split(",") if size), dtype[1])


def weight_copies(layers: Sequence[Layer], weights: set[str]) -> list[Layer]:
    """Layers that read a large constant, or an input named in `weights`, and write as much as they read of it.

    A multiplication reads a whole weight too, but what it writes has the size of the activations; and a plugin reads
    its weights where they lie.
    """

    def copies(layer: Layer) -> bool:
        if layer.type == "custom_layer":
            return False
        read = [one for one in layer.inputs if one.name in weights] + list(layer.constants)
        sizes = [prod(one.shape) for one in read if prod(one.shape) * _ITEM_BYTES.get(one.dtype, 1) >= MIN_WEIGHT_BYTES]
        written = [prod(one.shape) for one in layer.outputs if min(one.shape, default=-1) > 0]
        return any(out >= size for size in sizes for out in written)

    return [layer for layer in layers if copies(layer)]
