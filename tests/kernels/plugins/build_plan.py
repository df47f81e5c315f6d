"""Builds a plan of the four CAPA nodes: `build_plan.py LIBRARY PRECISION HIDDEN_SIZE`; its last line is JSON.

A process of its own: TensorRT may abort, and keeps the plugins that it was given.
"""

import json
import sys

import tensorrt_rtx as trt
from onnx import NodeProto, TensorProto, ValueInfoProto, helper

HEADS, KV_HEADS, HEAD_SIZE = 4, 2, 32
TOKENS, TEXT = (1, 1024, 6144), (1, 64, 2048)


def model(real: int, hidden_size: int) -> bytes:
    def node(op: str, inputs: list[str], outputs: list[str], **attributes: object) -> NodeProto:
        plugin = {"domain": "capa", "plugin_namespace": "capa", "plugin_version": "1"}
        return helper.make_node(op, inputs, outputs, op, **plugin, **attributes)

    def tensors(dtype: int, **shapes: list[int | str]) -> list[ValueInfoProto]:
        return [helper.make_tensor_value_info(name, dtype, shape) for name, shape in shapes.items()]

    nodes = [
        node("ContributionScore", ["query", "key", "value", "weight", "text_rows"], ["scores"], scale=0.125),
        node(
            "TopKKeep",
            ["scores", "num_keep"],
            ["kept"],
            min_keep_per_image=1,
            tensorrt_plugin_shape_input_indices=[1],
        ),
        node(
            "TokenGather",
            ["x", "key", "value", "cos", "sin", "kept"],
            ["x_kept", "key_kept", "value_kept", "cos_kept", "sin_kept"],
        ),
        node("VisualScale", ["x_kept", "scale", "text", "text_rows"], ["y"]),
    ]
    heads: list[int | str] = [1, KV_HEADS, "tokens", HEAD_SIZE]
    table: list[int | str] = [1, "tokens", HEAD_SIZE]
    inputs = tensors(
        real,
        query=[1, HEADS, 1, HEAD_SIZE],
        key=heads,
        value=heads,
        weight=[hidden_size, HEADS * HEAD_SIZE],
        x=["tokens", hidden_size],
        cos=table,
        sin=table,
        scale=[hidden_size],
        text=["text", hidden_size],
    ) + tensors(TensorProto.INT64, text_rows=["text"], num_keep=[1])
    outputs = tensors(real, y=["kept", hidden_size]) + tensors(TensorProto.INT64, kept=["kept"])
    graph = helper.make_graph(nodes, "capa", inputs, outputs)
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("capa", 1)]
    return helper.make_model(graph, opset_imports=opsets).SerializeToString()


def plan_bytes(builder: trt.Builder, network: trt.INetworkDefinition, libraries: list[str]) -> int | None:
    config = builder.create_builder_config()
    config.num_compute_capabilities = 2
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    config.set_compute_capability(trt.ComputeCapability.SM120, 1)
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if tensor.is_shape_tensor:
            profile.set_shape_input(tensor.name, [0], [256], [4096])
        else:
            sizes = TEXT if tensor.name in ("text", "text_rows") else TOKENS
            profile.set_shape(tensor.name, *([one if dim < 0 else dim for dim in tensor.shape] for one in sizes))
    config.add_optimization_profile(profile)
    if libraries:
        config.plugins_to_serialize = libraries
    plan = builder.build_serialized_network(network, config)
    return None if plan is None else plan.nbytes


library, precision, hidden_size = sys.argv[1:]
log = trt.Logger(trt.Logger.ERROR)
builder = trt.Builder(log)
trt.get_plugin_registry().load_library(library)
network = builder.create_network(0)
parser = trt.OnnxParser(network, log)
real = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16, "fp32": TensorProto.FLOAT}[precision]
parsed = parser.parse(model(real, int(hidden_size)))
outputs = [network.get_output(index) for index in range(network.num_outputs)]
result = {
    "parsed": parsed,
    "layers": [network.get_layer(index).type.name for index in range(network.num_layers)],
    "types": {one.name: one.dtype.name for one in outputs},
    "shapes": {one.name: list(one.shape) for one in outputs},
    "plan": plan_bytes(builder, network, []),
    "plan_with_library": plan_bytes(builder, network, [library]),
}
print(json.dumps(result))
