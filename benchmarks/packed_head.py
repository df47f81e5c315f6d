"""The product of an LM head in each type that it may have, on ONNX Runtime: milliseconds, bytes, and the error.

python -m benchmarks.packed_head

One thread; the products of all types take turns, and times are the processor's.
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

from benchmarks.cache_traffic import written
from benchmarks.selection.pages.words import table
from capa_export.base.weight_types import PackedLayers
from capa_export.config.quantization import HeadQuantization, rounding
from capa_export.model.quantized.packed import outer_scale, packed_scales, packed_values
from capa_export.model.quantized.rounded import nearest
from capa_export.model.quantized.weight import QuantizedWeight
from capa_export.passes.pack_weights import PackedForm, PackWeightsPass, outer_name, packed_name, scale_name

_INPUTS, _TOKENS, _ROUNDS = 512, 151_936, 15
_CASES: tuple[tuple[HeadQuantization, str], ...] = (
    ("none", "1"),
    ("int4", "1"),
    ("int4", "4"),
    ("int8", "1"),
    ("int8", "4"),
    ("fp8", "1"),
    ("fp8", "4"),
)
"""Type, and ONNX Runtime's accuracy level: 1 as `validate` has it, 4, with inputs rounded, as `run` has it."""


def _graph(weight: np.ndarray, form: PackedLayers | None) -> ir.Model:
    """A head [V, D] behind [1, D]."""
    model = ir.from_onnx_text(f"""<ir_version: 10, opset_import: ["": 23]>
        head (float[1, {_INPUTS}] x, float[{_TOKENS}, {_INPUTS}] w) => (float[1, {_TOKENS}] y) {{
            [lm_head] z = Gemm <transB = 1> (x, w)
            y = Identity (z)
        }}""")
    value = model.graph.inputs.pop()
    model.graph.initializers["w"] = value
    values: dict[str, np.ndarray] = {"w": weight}
    if form is not None:
        numbers, scales, outer = nearest(weight.copy(), form)
        group = form.group or _INPUTS
        packed = QuantizedWeight(
            kind=form.kind, read_values=lambda: numbers, scales=scales, group_size=group, outer_scale=outer
        )
        PackWeightsPass({"w": PackedForm(kind=form.kind, group=form.group)})(model)
        values = {packed_name("w"): packed_values(packed), scale_name("w"): packed_scales(packed)}
        if outer_name("w") in model.graph.initializers:
            values[outer_name("w")] = np.asarray(outer_scale(packed))
    for name, array in values.items():
        held = model.graph.initializers[name]
        assert held.dtype is not None and held.shape is not None
        typed = array.astype(held.dtype.numpy()).reshape(held.shape.numpy())
        held.const_value = ir.Tensor(typed, dtype=held.dtype, name=name)
    return model


def _session(model: ir.Model, kind: str, level: str) -> tuple[Any, list[str], int]:
    """A session, the operators that it runs, and the bytes of its file."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", level)
    if level == "1" and kind in ("int8", "fp8"):
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    with TemporaryDirectory() as folder:
        file, fused = Path(folder) / "head.onnx", Path(folder) / "fused.onnx"
        ir.save(model, file)
        options.optimized_model_filepath = str(fused)
        session = onnxruntime.InferenceSession(
            str(file), options, ["CPUExecutionProvider"], disabled_optimizers=["ConstantSharing"]
        )
        return session, [node.op_type for node in ir.load(fused).graph], file.stat().st_size


def measured() -> dict[str, Any]:
    """Every type."""
    random = np.random.default_rng(0)
    weight = random.standard_normal((_TOKENS, _INPUTS), dtype=np.float32) / np.float32(_INPUTS**0.5)
    x = random.standard_normal((1, _INPUTS), dtype=np.float32)
    opened = {case: _session(_graph(weight, rounding(case[0])), *case) for case in _CASES}
    exact = x @ weight.T
    seconds: dict[tuple[str, str], list[float]] = {case: [] for case in _CASES}
    for turn in range(_ROUNDS):
        for case in (*_CASES[turn % len(_CASES) :], *_CASES[: turn % len(_CASES)]):
            started = time.process_time()
            (found,) = opened[case][0].run(None, {"x": x})
            seconds[case].append(time.process_time() - started)
            assert np.isfinite(found).all()
    rows: list[dict[str, Any]] = []
    for kind, level in _CASES:
        session, operators, size = opened[kind, level]
        (found,) = session.run(None, {"x": x})
        rows.append(
            {
                "name": f"{kind}, level {level}",
                "megabytes": size / 1e6,
                "ms": 1e3 * median(seconds[kind, level]),
                "error": float(np.linalg.norm(found - exact) / np.linalg.norm(exact)),
                "operators": operators,
            }
        )
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "command": "python -m benchmarks.packed_head",
        "onnxruntime": version("onnxruntime"),
        "rows": rows,
    }


def page(result: dict[str, Any]) -> str:
    """The table."""
    lines = [
        [row["name"], f"{row['megabytes']:.0f}", f"{row['ms']:.1f}", f"{row['error']:.2%}", ", ".join(row["operators"])]
        for row in result["rows"]
    ]
    return f"""# An LM head in few bits

{result["date"]}, `{result["command"]}`, ONNX Runtime {result["onnxruntime"]}, one thread. One product of
[1, {_INPUTS}] with {_INPUTS} x {_TOKENS:,}, weights of one normal distribution, rounded as `--quantize-head` rounds
them. *level*: 1 multiplies in FP32, as `validate` has it, which lets ONNX Runtime dequantize INT8 and FP8 when it opens
the file; 4 rounds inputs to INT8, ONNX Runtime's default and as `run` has it.

{table(["weight", "MB", "ms", "error of the product", "ONNX Runtime has"], lines)}
"""


def main() -> None:
    result = measured()
    print(written(result, "packed-head", page(result)))


if __name__ == "__main__":
    main()
