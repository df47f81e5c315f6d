"""Makes of a shipped graph the one that a TensorRT builder reads."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from capa_export.errors import CapaError, ExitCode
from capa_export.external_weights import externalize_weights
from capa_export.graph.functions import DOMAIN

__all__ = ["Prepared", "prepare"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """What was written, and what the builder has to be told of it."""

    weights: Sequence[dict[str, Any]]
    """Weights that became inputs of the network."""
    num_plugins: int
    """Nodes that have to become plugin layers."""


def prepare(onnx: Path, out: Path, *, external_weights: bool, plugins: bool, keep_bodies: bool = True) -> Prepared:
    """Write `out`, which finds its weights from the folder of `onnx`; reads no weight.

    Args:
        onnx: a graph as `export` writes it.
        out: the file to write.
        external_weights: whether large weights become inputs of the network.
        plugins: whether the CAPA nodes become plugin layers.
        keep_bodies: whether the file says what the CAPA nodes compute. Before 10.7, TensorRT takes a body even where
            there is a plugin.

    Raises:
        CapaError: plugins are asked for in a precision that they do not take.
    """
    model = ir.load(onnx)
    nodes = [node for node in model.graph if node.domain == DOMAIN]
    if plugins and nodes and model.graph.inputs[0].dtype == ir.DataType.FLOAT:
        raise CapaError(
            f"{onnx}: is FP32, and the plugins take fp16 and bf16: build with --plugins none", ExitCode.ENGINE
        )
    weights = externalize_weights(model, plugins=plugins) if external_weights else []
    for node in model.graph.all_nodes():
        if node.op_type == "Attention":
            # Without it, attention with no fused kernel (FP32) fails; where there is one, it is used all the same.
            node.attributes.add(ir.AttrInt64("TRT_decomposable", 1))
    if not keep_bodies:
        model.functions.clear()
    out.write_bytes(ir.to_proto(model).SerializeToString())
    return Prepared(weights=[asdict(weight) for weight in weights], num_plugins=len(nodes) if plugins else 0)
