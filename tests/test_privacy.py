"""No library that is used here reports what is done with it."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir

_OPENS_A_GRAPH = """
import sys
from capa_export.run.providers import require_provider
require_provider("cpu")
import onnxruntime
onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
"""


def test_onnx_runtime_keeps_no_device_id_and_no_events(tmp_path: Path) -> None:
    """As in a user's shell, since under CI it keeps none by itself."""
    value = ir.Value(name="one", const_value=ir.tensor(np.ones(1, np.float32), name="one"))
    node = ir.node("Identity", [value])
    node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = "same", ir.DataType.FLOAT, ir.Shape([1])
    graph = ir.Graph([], node.outputs, nodes=[node], initializers=[value], opset_imports={"": 20}, name="same")
    ir.save(ir.Model(graph, ir_version=10), tmp_path / "graph.onnx")
    (tmp_path / "home").mkdir()
    left_out = {"CI", "ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME"}
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    subprocess.run(
        [sys.executable, "-c", _OPENS_A_GRAPH, str(tmp_path / "graph.onnx")],
        env=environment | {"HOME": str(tmp_path / "home")},
        check=True,
    )
    assert [*(tmp_path / "home").rglob("*")] == []
