"""Floating-point operations of an exported graph, by the shapes that its nodes have when it runs."""

from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import inliner

__all__ = ["graph_flops"]

_INPUTS = {"Gemm": (0, 1), "MatMul": (0, 1), "Attention": (0, 1, 2)}


def graph_flops(path: Path, feed: Mapping[str, np.ndarray]) -> Counter[str]:
    """Operations of all matrix products by node name, two a multiplication with its addition.

    What stands in functions is counted under the domain, `capa`.
    """
    model = inliner.inline_local_functions(onnx.load(path, load_external_data=False))
    nodes = [node for node in model.graph.node if node.op_type in _INPUTS]
    weights = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    watched = {node.input[i] for node in nodes for i in _INPUTS[node.op_type]} - set(weights)
    known = {value.name for value in model.graph.output} | {value.name for value in model.graph.input}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(watched - known))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    fed = {entry.name: feed[entry.name] for entry in session.get_inputs()}
    names = sorted(watched - set(fed))
    values = {**fed, **dict(zip(names, session.run(names, fed), strict=True))}
    shapes = weights | {name: value.shape for name, value in values.items()}
    counted: Counter[str] = Counter()
    for node in nodes:
        counted[node.name or "capa"] += _flops(node, [shapes[node.input[i]] for i in _INPUTS[node.op_type]])
    return counted


def _flops(node: onnx.NodeProto, shapes: list[tuple[int, ...]]) -> int:
    flags = {attribute.name: attribute.i for attribute in node.attribute}
    if node.op_type == "Attention":
        query, key, value = shapes
        return 2 * prod(query[:3]) * key[2] * (query[3] + value[3])
    a, b = shapes
    assert not flags.get("transA")
    batch = prod(np.broadcast_shapes(a[:-2], b[:-2]))
    return 2 * batch * prod(a[-2:]) * (b[0] if flags.get("transB") else b[-1])
