"""What the runtimes make of a KV cache in 8 bits: one step of decode whose past is stored as INT8 or FP8.

python -m benchmarks.cache_types

It needs tensorrt_rtx and no GPU: of an engine, the layer that reads the past says whether it reads it as it is stored.
ONNX Runtime's steps are timed on one thread, one after the other, beside those of a past in FP16.
"""

import time
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from onnx import parser

from benchmarks.cache_traffic import built_layers, written
from benchmarks.selection.pages.words import table
from capa_export.trt.layers import Layer

_HEADS, _SIZE, _ROWS = 8, 64, 2048
_CAPABILITIES = {"fp16": ("8.6",), "int8": ("8.6", "12.0"), "fp8": ("8.9", "12.0")}
_ELEMENTS = {"fp16": "float16", "int8": "int8", "fp8": "float8e4m3fn"}
_BODIES = {
    "products and a softmax": """
        turned = Transpose <perm = [0, 1, 3, 2]> (k)
        found = MatMul (query, turned)
        share = Softmax <axis = -1> (found)
        out = MatMul (share, v)""",
    "Attention": "out = Attention (query, k, v)",
}
_STEPS = 30


def _graph(kind: str, body: str) -> ir.Model:
    """A step whose query is scaled already; keys and values have one scale each."""
    shape = f"[1, {_HEADS}, past, {_SIZE}]"
    same = "k = Identity (keys)\n v = Identity (values)"
    expanded = "k = DequantizeLinear (keys, scale)\n v = DequantizeLinear (values, scale)"
    text = f"""<ir_version: 10, opset_import: ["": 23]>
    step (float16[1, {_HEADS}, 1, {_SIZE}] query, {_ELEMENTS[kind]}{shape} keys, {_ELEMENTS[kind]}{shape} values,
          float16 scale) => (float16[1, {_HEADS}, 1, {_SIZE}] out) {{
        {same if kind == "fp16" else expanded}
        {_BODIES[body]}
    }}"""
    model = ir.from_proto(parser.parse_model(text))
    scale = model.graph.inputs.pop()
    scale.const_value = ir.tensor(np.float16(1 / 32), name="scale")
    if scale.uses():
        model.graph.register_initializer(scale)
    return model


def _reads(layers: list[Layer]) -> str:
    """What reads the past of an engine."""
    readers = [layer for layer in layers if {"keys", "values"} & {tensor.name for tensor in layer.inputs}]
    both = [layer for layer in readers if {"keys", "values", "query"} <= {tensor.name for tensor in layer.inputs}]
    if both and len(readers) == 1:
        return f"as it is stored, in one layer with the query ({both[0].type})"
    return f"by {len(readers)} of {len(layers)} layers ({', '.join(sorted({layer.type for layer in readers}))})"


def _milliseconds(model: ir.Model, kind: str) -> float:
    """The median of ONNX Runtime's steps, processor time of one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    with TemporaryDirectory() as folder:
        ir.save(model, file := Path(folder) / "step.onnx")
        session = onnxruntime.InferenceSession(str(file), options, ["CPUExecutionProvider"])
    draw = np.random.default_rng(0).standard_normal
    past = draw((2, 1, _HEADS, _ROWS, _SIZE), dtype=np.float32)
    stored = {"fp16": past.astype(np.float16), "int8": (32 * past).astype(np.int8)}
    query = onnxruntime.OrtValue.ortvalue_from_numpy(draw((1, _HEADS, 1, _SIZE), dtype=np.float32).astype(np.float16))
    feed: Any = {"query": query}
    for name, side in (("keys", 0), ("values", 1)):
        if kind == "fp8":
            numbers = ir.tensor((32 * past[side]).clip(-448, 448).astype(ir.DataType.FLOAT8E4M3FN.numpy()))
            element = ir.DataType.FLOAT8E4M3FN.value
            value = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(numbers.numpy().view(np.uint8), element)
        else:
            value = onnxruntime.OrtValue.ortvalue_from_numpy(stored[kind][side])
        feed[name] = value
    seconds: list[float] = []
    for _ in range(_STEPS):
        started = time.process_time()
        session.run_with_ort_values(["out"], feed)
        seconds.append(time.process_time() - started)
    return 1e3 * median(seconds)


def measured() -> dict[str, Any]:
    """Every type under every way to write the attention."""
    rows: list[dict[str, Any]] = []
    for kind, capabilities in _CAPABILITIES.items():
        for body in _BODIES:
            row: dict[str, Any] = {
                "name": f"{kind}, {body}",
                "past": kind,
                "attention": body,
                "onnxruntime_ms": _milliseconds(_graph(kind, body), kind),
            }
            sizes = {"past": (1, _ROWS, 2 * _ROWS)}
            for capability in capabilities:
                with TemporaryDirectory() as folder:
                    row[capability] = _reads(built_layers(_graph(kind, body), sizes, Path(folder), capability))
            rows.append(row)
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "command": "python -m benchmarks.cache_types",
        "tensorrt_rtx": version("tensorrt-rtx"),
        "onnxruntime": version("onnxruntime"),
        "rows": rows,
    }


def page(result: dict[str, Any]) -> str:
    """The table."""
    known = sorted({one for named in _CAPABILITIES.values() for one in named}, key=float)
    lines = [
        [row["past"], row["attention"], f"{row['onnxruntime_ms']:.2f}", *(row.get(one, "") for one in known)]
        for row in result["rows"]
    ]
    return f"""# A KV cache in 8 bits

{result["date"]}, `{result["command"]}`. A step of decode, {_HEADS} heads of {_SIZE} numbers, {_ROWS:,}
tokens before it. ONNX Runtime {result["onnxruntime"]}: milliseconds of one thread. TensorRT-RTX
{result["tensorrt_rtx"]}: what reads the past in an engine for each compute capability; nothing was run on a GPU.

{table(["past", "attention written as", "ONNX Runtime, ms", *known], lines)}
"""


def main() -> None:
    result = measured()
    print(written(result, "cache-types", page(result)))


if __name__ == "__main__":
    main()
