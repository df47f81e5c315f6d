"""Python plugins: that TensorRT takes them for the CAPA nodes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from capa_export.graph.functions import FUNCTIONS
from capa_export.kernels.plugins.alias import ensure_parser_library

GRAPH = """
<ir_version: 10, opset_import: ["": 24, "capa": 1]>
all_nodes (DTYPE[1, 4, 1, HEAD] query, DTYPE[1, 2, T, HEAD] key, DTYPE[1, 2, T, HEAD] value, DTYPE[64, PROJ] weight,
    int64[X] positions, int64[1] num_keep, DTYPE[T, 64] hidden, DTYPE[1, T, 16] cos, DTYPE[1, T, 16] sin,
    DTYPE[64] alpha, DTYPE[R, 64] text, int64[R] rows)
    => (DTYPE[K, 64] y, DTYPE[1, 2, K, HEAD] key_kept, DTYPE[1, 2, K, HEAD] value_kept, DTYPE[1, K, 16] cos_kept,
        DTYPE[1, K, 16] sin_kept, int64[K] kept) {
    scores = capa.ContributionScore <PLUGIN, scale = 0.125> (query, key, value, weight, positions)
    text_count = Shape (positions)
    num_rows = Add (num_keep, text_count)
    kept = capa.TopKKeep <PLUGIN, min_keep_per_image = 3, tensorrt_plugin_shape_input_indices = [1]> (scores, num_rows)
    hidden_kept, key_kept, value_kept, cos_kept, sin_kept
        = capa.TokenGather <PLUGIN> (hidden, key, value, cos, sin, kept)
    y = capa.VisualScale <PLUGIN> (hidden_kept, alpha, text, rows)
}
"""
BUILD = """
import gc, json, sys
import tensorrt_rtx as trt

spec = json.loads(sys.argv[1])
layers = ""

class Log(trt.ILogger):
    def log(self, severity, message):
        global layers
        if message.startswith("Layers:"):
            layers += message
        elif severity <= trt.ILogger.ERROR:
            print(message, file=sys.stderr)

log = Log()
if spec["register"]:
    from capa_export.kernels.plugins.python_plugins import register

    register(trt)
    gc.collect()
builder = trt.Builder(log)
network = builder.create_network(0)
parser = trt.OnnxParser(network, log)
if not parser.parse_from_file(spec["onnx"]):
    print(json.dumps({"error": parser.get_error(0).desc()}))
    sys.exit()
config = builder.create_builder_config()
config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
config.num_compute_capabilities = 2
for index, capability in enumerate((trt.ComputeCapability.SM86, trt.ComputeCapability.SM120)):
    config.set_compute_capability(capability, index)
profile = builder.create_optimization_profile()
for index in range(network.num_inputs):
    tensor = network.get_input(index)
    if tensor.is_shape_tensor:
        profile.set_shape_input(tensor.name, (1,), (16,), (64,))
    else:
        shapes = ([size if size > 0 else length for size in tensor.shape] for length in (8, 64, 128))
        profile.set_shape(tensor.name, *shapes)
config.add_optimization_profile(profile)
plan = builder.build_serialized_network(network, config)
types = [network.get_layer(index).type.name for index in range(network.num_layers)]
names = [network.get_layer(index).name for index in range(network.num_layers)]
print(json.dumps({
    "plugins": sorted(name for name, type in zip(names, types) if type == "PLUGIN_V3"),
    "outputs": {network.get_output(i).name: [network.get_output(i).dtype.name, *network.get_output(i).shape]
                for i in range(network.num_outputs)},
    "custom": layers.count("LayerType: custom_layer"),
    "plan": bytes(plan).count(b"min_keep_per_image") if plan is not None else None,
}))
"""


def _build(folder: Path, dtype: str, head_size: int = 64, **spec: Any) -> tuple[dict[str, Any], str]:
    text = GRAPH.replace("PLUGIN", 'plugin_namespace = "capa", plugin_version = "1"')
    for word, value in {"DTYPE": dtype, "HEAD": str(head_size), "PROJ": str(4 * head_size)}.items():
        text = text.replace(word, value)
    model = ir.from_onnx_text(text)
    for node in model.graph:
        node.name = node.op_type
    for name in ("ContributionScore", "TopKKeep", "TokenGather", "VisualScale"):
        model.functions[FUNCTIONS[name].identifier()] = FUNCTIONS[name]
    ir.save(model, folder / "graph.onnx")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= ensure_parser_library(folder)
    done = subprocess.run(
        [sys.executable, "-c", BUILD, json.dumps({"onnx": str(folder / "graph.onnx"), **spec})],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.mark.trt
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float"])
def test_every_node_becomes_one_plugin_layer(dtype: str, tmp_path: Path) -> None:
    result, log = _build(tmp_path, dtype, register=True)
    assert result["plugins"] == ["ContributionScore", "TokenGather", "TopKKeep", "VisualScale"], log
    assert result["custom"] == 4
    assert result["plan"] > 0, "the attributes are in the plan"
    real = {"float16": "HALF", "bfloat16": "BF16", "float": "FLOAT"}[dtype]
    assert result["outputs"]["y"] == [real, -1, 64]
    assert result["outputs"]["key_kept"] == [real, 1, 2, -1, 64]
    assert result["outputs"]["kept"] == ["INT64", -1]


_FIELDS_STAY = """
import sys
import numpy as np, tensorrt_rtx as trt
from capa_export.kernels.plugins.python_plugins import register
register(trt)
assert "torch" not in sys.modules, "takes longer to import than most engines to build"
creator = trt.get_plugin_registry().get_creator("ContributionScore", "1", "capa")
scale = np.array([0.0883883], np.float32)
given = trt.PluginFieldCollection([trt.PluginField("scale", scale, trt.PluginFieldType.FLOAT32)])
plugin = creator.create_plugin("node", given, trt.TensorRTPhase.BUILD)
fields = plugin.get_fields_to_serialize()
litter = [np.array([7.0], np.float32) for _ in range(10000)]
print(fields[0].data[0])
"""


@pytest.mark.trt
def test_attributes_stay_where_tensorrt_reads_them() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", _FIELDS_STAY]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) == pytest.approx(0.0883883)


@pytest.mark.trt
def test_without_plugins_the_bodies_are_taken(tmp_path: Path) -> None:
    result, log = _build(tmp_path, "float16", register=False)
    assert result["plugins"] == [], log
    assert result["custom"] == 0
    assert result["plan"] == 0


@pytest.mark.trt
def test_a_head_size_without_kernels_fails_the_parser_not_the_process(tmp_path: Path) -> None:
    result, log = _build(tmp_path, "float16", head_size=72, register=True)
    assert "output shape computation failed" in result["error"]
    assert "ContributionScore: head_size is 72" in log
