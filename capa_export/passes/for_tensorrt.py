"""Makes of a shipped graph the one that a TensorRT builder reads."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from capa_export.base.errors import CapaError, ExitCode
from capa_export.graph.functions import DOMAIN, PLUGIN
from capa_export.passes.external_weights import externalize_weights
from capa_export.passes.lower import lower

__all__ = ["Prepared", "prepare"]

_INLINED = "capa.inlined"


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """What was written, and what the builder has to be told of it."""

    weights: Sequence[dict[str, Any]]
    """Weights that became inputs of the network."""
    num_plugins: int
    """Nodes that have to become plugin layers."""


def prepare(
    onnx: Path, out: Path, *, external_weights: bool, plugins: bool, version: tuple[int, ...] | None = None
) -> Prepared:
    """Write `out`, which finds its weights from the folder of `onnx`; reads no weight.

    Args:
        onnx: a graph as `export` writes it.
        out: the file to write.
        external_weights: whether large weights become inputs of the network.
        plugins: whether the CAPA nodes become plugin layers.
        version: of the TensorRT that reads it; None for TensorRT-RTX, which knows all our operators.

    Raises:
        CapaError: plugins are asked for in a precision that they do not take.
    """
    model = ir.load(onnx)
    # Those in an FP32 island have no plugin.
    nodes = [node for node in model.graph if node.domain == DOMAIN and PLUGIN.keys() <= node.attributes.keys()]
    if plugins and nodes and model.graph.inputs[0].dtype == ir.DataType.FLOAT:
        raise CapaError(
            f"{onnx}: is FP32, and the plugins take fp16 and bf16: build with --plugins none", ExitCode.ENGINE
        )
    if version is not None and lower(model, version):
        if plugins:
            # Before 10.7, TensorRT takes a body even where there is a plugin.
            _inline_others(model, nodes)
            model.functions.clear()
        else:
            # Before 10.8, a value of the graph that has the name of a function's input stands in for it.
            InlinePass()(model)
    weights = externalize_weights(model) if external_weights else []
    for node in model.graph.all_nodes():
        if node.op_type == "Attention":
            # Without it, attention with no fused kernel (FP32) fails; where there is one, it is used all the same.
            node.attributes.add(ir.AttrInt64("TRT_decomposable", 1))
    out.write_bytes(ir.to_proto(model).SerializeToString())
    return Prepared(weights=[asdict(weight) for weight in weights], num_plugins=len(nodes) if plugins else 0)


def _inline_others(model: ir.Model, plugins: Sequence[ir.Node]) -> None:
    """Put their bodies in the places of the CAPA nodes that are no plugins."""
    for node in model.graph:
        if node.domain == DOMAIN and node not in plugins:
            function = model.functions[node.op_identifier()]
            node.domain = _INLINED
            body = ir.Function(
                _INLINED, function.name, graph=function.graph.clone(), attributes=function.attributes.values()
            )
            model.functions[body.identifier()] = body
    InlinePass(lambda function: function.domain == _INLINED)(model)
