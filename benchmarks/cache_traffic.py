"""Counts how often a decode step moves the cache, from the layers that TensorRT-RTX makes of two layers of true size.

python -m benchmarks.cache_traffic

It needs tensorrt_rtx and no GPU: bytes are counted, and milliseconds are bytes by the bandwidth of a data sheet. A
tensor counts with what it grows by when the cache does. FFN and vocabulary are narrow, since they read no cache.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir

from benchmarks.random_checkpoint import CONFIGS
from benchmarks.selection.pages.words import table
from capa_export.base.dims import DecoderDims
from capa_export.config.target import load_target
from capa_export.graph.contract import CACHE_ROWS, is_cache, is_past
from capa_export.graph.decoder import decode_model
from capa_export.graph.rotary import rotary_tables
from capa_export.model.families import load_family
from capa_export.passes.cache_blocks import CacheBlocksPass
from capa_export.passes.for_tensorrt import DecomposableAttentionPass
from capa_export.passes.lower import LowerPass
from capa_export.trt.layers import Layer, Tensor, cache_copies, parse_layers

RESULTS = Path(__file__).parent / "results"
_MODELS = {
    "Qwen2.5-VL-3B": ("qwen25vl", "qwen25vl-3b"),
    "Qwen2.5-VL-7B": ("qwen25vl", "qwen25vl-7b"),
    "LLaVA-1.5-7B": ("llava15", "llava15-7b"),
    "InternVL3-8B": ("internvl3", "internvl3-8b"),
}
_DEVICES = (("orin", "AGX Orin 64GB"), ("thor", "Jetson T5000"), ("rtx", "RTX 4090"), ("rtx", "RTX 5090"))
_LAYERS, _ROWS = 2, 3840
"""Rows that no other dimension of these models has the number of."""
_ITEM_BYTES = {"Half": 2, "Float": 4}


class Variant(NamedTuple):
    """A decode graph, and what is copied outside of its engine."""

    name: str
    change: Callable[[ir.Model], object]
    outside: int
    """Times that the runtime moves the cache at a step."""
    static: bool = False
    """Whether TensorRT asks for a room that is fixed when the engine is built."""


def _appended(model: ir.Model, update: str, attention: str) -> None:
    """Let the cache grow in place, by operators that ask for it: `TensorScatter`, or TensorRT's own."""
    graph = model.graph
    at = ir.Value(name="at", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT64))
    mask = ir.Value(name="mask", shape=ir.Shape([1, 1, 1, _ROWS]), type=ir.TensorType(ir.DataType.FLOAT16))
    graph.inputs.extend([at, mask])
    graph.opset_imports["trt"] = 1
    for node in [
        node for node in graph if node.op_type == "Concat" and is_past(str(node.inputs[0] and node.inputs[0].name))
    ]:
        node.op_type, node.domain = update, "trt" if update.startswith("TRT") else ""
        node.attributes.clear()
        node.attributes.add(ir.AttrString("mode", "linear"))
        node.resize_inputs(3)
        node.replace_input_with(2, at)
    for node in [node for node in graph if node.op_type == "Attention"]:
        node.replace_input_with(3, mask)
        if attention != "Attention":
            node.op_type, node.domain = attention, "trt"
            node.attributes.clear()


VARIANTS = (
    Variant("concatenated, as exported", DecomposableAttentionPass(), 2),
    Variant("TensorScatter", partial(_appended, update="TensorScatter", attention="Attention"), 0, static=True),
    Variant("KVCacheUpdate", partial(_appended, update="TRT_KVCacheUpdate", attention="TRT_Attention"), 0, static=True),
    Variant("in blocks", CacheBlocksPass(), 0),
    Variant(
        "in blocks, for TensorRT before 10.15",
        ir.passes.Sequential(CacheBlocksPass(), LowerPass((10, 3))),
        0,
    ),
)


def _graph(family: str, checkpoint: str) -> tuple[ir.Model, DecoderDims]:
    """Decode with weights that are inputs, so that nobody needs their bytes."""
    dims = load_family(family).model_dims(CONFIGS[checkpoint])
    decoder = replace(dims.decoder, num_layers=_LAYERS, intermediate_size=512, vocab_size=512)
    model = decode_model(decoder, ir.DataType.FLOAT16, rotary_tables(dims), prune_layers=())
    for name, value in list(model.graph.initializers.items()):
        assert value.shape is not None
        if len(value.shape) == 2:
            model.graph.inputs.append(model.graph.initializers.pop(name))
        elif value.const_value is None:
            value.const_value = ir.tensor(np.ones(value.shape.numpy(), np.float16), name=name)
    return model, decoder


def _layers(model: ir.Model, variant: Variant, folder: Path) -> list[Layer]:
    variant.change(model)
    # Prompts, tokens, and rows or blocks: at least, usually and at most.
    single = (1, 1, 1)
    sizes = {"batch": single, "step": single, "past": (1, 1024, 8192), "past_blocks": (1, 4, 32)}
    if variant.static:
        sizes = {"batch": single, "step": single, "past": (_ROWS, _ROWS, _ROWS)}
        for value in (*model.graph.inputs, *model.graph.outputs):
            if is_cache(str(value.name)) and value.shape is not None:
                value.shape = ir.Shape([1, *(one if isinstance(one, int) else _ROWS for one in value.shape[1:])])
    return built_layers(model, sizes, folder, "8.9")


def built_layers(
    model: ir.Model, sizes: Mapping[str, tuple[int, int, int]], folder: Path, capability: str
) -> list[Layer]:
    """The layers of an engine for one compute capability, by TensorRT-RTX.

    Args:
        model: saved into the folder.
        sizes: of its symbolic dimensions: at least, usually and at most.
        folder: empty.
        capability: as `8.9`.
    """
    file, files = folder / "model.onnx", {part: str(folder / part) for part in ("plan", "layers", "result")}
    shapes = {
        name: [[one if isinstance(one, int) else sizes[one][end] for one in shape] for end in range(3)]
        for name, shape in ((str(value.name), _named(value)) for value in model.graph.inputs)
    }
    ir.save(model, file)
    task = {
        **files,
        "runtime": "tensorrt_rtx",
        "version_min": "1.7",
        "version_below": "2",
        "compute_capabilities": [capability],
        "plugins": {"kind": "none", "count": 0, "library": None},
        "onnx": str(file),
        "beside": str(file),
        "profiles": [{"shapes": shapes, "shape_inputs": {}}],
    }
    (folder / "task.json").write_text(json.dumps(task), encoding="utf-8")
    worker = [sys.executable, "-m", "capa_export.trt.worker", str(folder / "task.json")]
    subprocess.run(worker, capture_output=True, check=False)
    result = json.loads(Path(files["result"]).read_text(encoding="utf-8"))
    if "error" in result:
        raise SystemExit(result["error"])
    return parse_layers(Path(files["layers"]).read_text(encoding="utf-8"))


def _named(value: ir.Value) -> list[int | str]:
    assert value.shape is not None
    return [one if isinstance(one, int) else str(one.value) for one in value.shape]


def _bytes(tensor: Tensor, dims: DecoderDims, rows: int) -> int:
    """Bytes of a tensor where one prompt has so many rows; merged dimensions are told by those that are left."""
    groups, size, blocks = dims.num_kv_heads, dims.head_dim, rows // CACHE_ROWS
    shape = [rows if one in (_ROWS, _ROWS + 1) else one for one in tensor.shape]
    in_blocks = CACHE_ROWS in shape
    if groups in shape:
        merged = blocks if in_blocks else rows
    else:
        merged = groups * blocks if in_blocks or size in shape else rows
    return prod(merged if one == -1 else one for one in shape) * _ITEM_BYTES.get(tensor.dtype, 8)


def _passes(layers: Sequence[Layer], dims: DecoderDims) -> float:
    """Times that the layers move the cache: what they read and write more where it is twice as long."""

    def moved(rows: int) -> int:
        # What grows in place is an input and an output of the layer that writes one row of it.
        grown = [
            sum(_bytes(one, dims, rows) for one in (*layer.inputs, *layer.outputs) if not _in_place(one, layer))
            for layer in layers
        ]
        return sum(grown)

    cache = 2 * _LAYERS * _ROWS * dims.num_kv_heads * dims.head_dim * 2
    return (moved(2 * _ROWS) - moved(_ROWS)) / cache


def _in_place(tensor: Tensor, layer: Layer) -> bool:
    return all(any(one.name == tensor.name for one in side) for side in (layer.inputs, layer.outputs))


def measured() -> dict[str, Any]:
    """Every variant of every model."""
    models: dict[str, Any] = {}
    for name, (family, checkpoint) in _MODELS.items():
        found: dict[str, Any] = {}
        for variant in VARIANTS:
            model, dims = _graph(family, checkpoint)
            with TemporaryDirectory() as folder:
                layers = _layers(model, variant, Path(folder))
            inside = round(_passes(layers, dims), 2)
            found[variant.name] = {
                "inside": inside,
                "passes": round(inside + variant.outside, 2),
                "copies": len(cache_copies(layers)),
                "layers": len(layers),
            }
        full = load_family(family).model_dims(CONFIGS[checkpoint]).decoder
        cache = 2 * full.num_layers * _ROWS * full.num_kv_heads * full.head_dim * 2
        models[name] = {"cache_bytes": cache, "variants": found}
    devices = {device: load_target(target).devices[device].bandwidth for target, device in _DEVICES}
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "command": "python -m benchmarks.cache_traffic",
        "tensorrt_rtx": version("tensorrt-rtx"),
        "rows": _ROWS,
        "bandwidth": devices,
        "models": models,
    }


def page(result: dict[str, Any]) -> str:
    """The tables."""
    names = [variant.name for variant in VARIANTS]
    models = result["models"]
    passes = [[name, *(f"{one['variants'][way]['passes']:.2f}" for way in names)] for name, one in models.items()]
    times = [
        [
            name,
            f"{one['cache_bytes'] / 1e6:,.0f}",
            *(_times(one, bandwidth) for bandwidth in result["bandwidth"].values()),
        ]
        for name, one in models.items()
    ]
    return f"""# How often a decode step moves the cache

{result["date"]}, TensorRT-RTX {result["tensorrt_rtx"]}, SM 8.9, FP16, `{result["command"]}`. Bytes of the layers that
read or write what grows with the cache, in units of the cache; of what is concatenated, with the two of the shift that
the runtime made behind every step. Nothing was run on a GPU: a layer is taken to read each of its inputs once.

{table(["model", *names], passes)}

Milliseconds of a step for the cache of one prompt of {result["rows"]:,} rows at the data sheet's bandwidth: as it was,
concatenated, and in blocks.

{table(["model", "cache, MB", *result["bandwidth"]], times)}
"""


def _times(model: dict[str, Any], bandwidth: float) -> str:
    ways = [model["variants"][VARIANTS[index].name]["passes"] for index in (0, 3)]
    return " -> ".join(f"{passes * model['cache_bytes'] / bandwidth / 1e6:.2f}" for passes in ways)


def written(result: Mapping[str, Any], name: str, page: str) -> str:
    """Keep a result and its page under the day's name; returns the page."""
    stem = RESULTS / f"{result['date']}-{name}"
    stem.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    stem.with_suffix(".md").write_text(page, encoding="utf-8")
    return page


def main() -> None:
    result = measured()
    print(written(result, "cache-traffic", page(result)))


if __name__ == "__main__":
    main()
