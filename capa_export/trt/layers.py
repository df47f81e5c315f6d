"""Reads what TensorRT made of a graph: its fused layers, and those that copy weights or caches."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from capa_export.base.errors import CapaError, ExitCode
from capa_export.base.progress import say
from capa_export.graph.contract import is_past, is_present
from capa_export.passes.external_weights import MIN_WEIGHT_BYTES

__all__ = ["Layer", "Tensor", "cache_copies", "parse_layers", "read_engine", "weight_copies"]

_ITEM_BYTES = {"Float": 4, "Half": 2, "BFloat16": 2, "Int64": 8, "Int32": 4, "Bool": 1, "UInt8": 1, "Int8": 1, "FP8": 1}

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


def read_engine(engine: Path, built: Mapping[str, Any], weights: Path) -> dict[str, Any]:
    """The manifest's entry of an engine; `NAME.layers.txt`, in TensorRT's words, becomes `NAME.layers.json`.

    Args:
        engine: as the builder left it, with its files beside it.
        built: what the builder says of it.
        weights: the file that lists the inputs which are weights, if there are any.

    Raises:
        CapaError: layers copy, cast or transpose a whole weight each time the engine runs.
    """
    text = engine.with_suffix(".layers.txt")
    layers = parse_layers(text.read_text(encoding="utf-8"))
    text.unlink()
    table = json.dumps([asdict(layer) for layer in layers], indent=1) + "\n"
    engine.with_suffix(".layers.json").write_text(table, encoding="utf-8")
    inputs = set(json.loads(weights.read_text(encoding="utf-8"))) if weights.exists() else set[str]()
    if copies := weight_copies(layers, inputs):
        raise CapaError(
            f"{built['onnx']}: the engine would copy weights at every run ({copies[0].name}); "
            "this is a defect of the graph, please report it",
            ExitCode.ENGINE,
        )
    if copied := cache_copies(layers):
        # Slower, and not wrong: an engine of a TensorRT that knows no better is still one.
        said = f"{len(copied)} caches at every step ({copied[0].name})"
        say(f"{engine.name}: this TensorRT copies {said}, which is slower")
    if not layers:
        say(f"{engine.name}: this TensorRT lists no layers, so whether weights or caches are copied is not known")
    types = Counter(layer.type for layer in layers)
    return {
        "onnx": built["onnx"],
        "serves": built["serves"],
        "bytes": built["bytes"],
        "seconds": built["seconds"],
        "peak_memory_bytes": built["peak_rss_bytes"],
        "layers": len(layers),
        "layers_by_type": dict(sorted(types.items())),
        # Each profile has them.
        "custom_layers": types["custom_layer"] // len(built["serves"]),
        "capa_nodes": built["capa_nodes"],
        "weight_copies": len(copies),
        "cache_copies": len(copied),
        "activation_bytes": _activation_bytes(engine.with_suffix(".log")),
        "runtime": built["version"],
        "warnings": [warning for warning in dict.fromkeys(built["warnings"]) if not _NO_NEWS.search(warning)],
    }


def _activation_bytes(log: Path) -> int | None:
    """What an execution context takes at the largest shapes; None where the runtime does not say."""
    said = re.findall(r"Total Activation Memory: (\d+) bytes", log.read_text(encoding="utf-8", errors="replace"))
    # Of each profile.
    return max(map(int, said)) if said else None


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
    its weights where they lie. A vector, as the scales of a head's outputs are, is no weight.
    """

    def is_weight(one: Tensor) -> bool:
        size = prod(one.shape)
        return size * _ITEM_BYTES.get(one.dtype, 1) >= MIN_WEIGHT_BYTES and max(one.shape, default=1) < size

    def copies(layer: Layer) -> bool:
        if layer.type == "custom_layer":
            return False
        read = [one for one in layer.inputs if one.name in weights] + list(layer.constants)
        sizes = [prod(one.shape) for one in read if is_weight(one)]
        written = [prod(one.shape) for one in layer.outputs if min(one.shape, default=-1) > 0]
        return any(out >= size for size in sizes for out in written)

    return [layer for layer in layers if copies(layer)]


def cache_copies(layers: Sequence[Layer]) -> list[Layer]:
    """Layers that read a past input and write as many numbers of the size of a head, but for the new tokens' own.

    How many blocks and prompts there are is known at run time only, and what is copied may have these as one dimension
    or the rows of all blocks as one; scores have no dimension of a head's size, and what attention returns has no rows.
    """
    pasts = [one.shape for layer in layers for one in layer.inputs if is_past(one.name)]
    if not pasts:
        return []
    cache = max(pasts, key=len)
    groups, rows, head_size = cache[1], cache[-2], cache[-1]

    def has_rows(shape: Sequence[int]) -> bool:
        if head_size not in shape:
            return False
        others = prod(size for size in shape if size > 0) // head_size
        return (
            others % rows == 0
            if rows > 0 and others >= rows
            else (shape.count(-1) >= max(cache.count(-1), 1) and groups % others == 0)
        )

    return [
        layer
        for layer in layers
        if layer.type not in ("custom_layer", "gemm")
        and any(is_past(one.name) for one in layer.inputs)
        and any(has_rows(one.shape) for one in layer.outputs if not is_present(one.name))
    ]
