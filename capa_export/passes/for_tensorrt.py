"""Makes of a shipped graph the one that a TensorRT builder reads."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from capa_export.base.errors import CapaError, ExitCode
from capa_export.graph.functions import DOMAIN, FUNCTIONS, PLUGIN
from capa_export.passes.cache_blocks import CacheBlocksPass
from capa_export.passes.distinct_inputs import DistinctInputsPass
from capa_export.passes.external_weights import ExternalWeightsPass, movable_weights
from capa_export.passes.join_decode import JoinDecodePass
from capa_export.passes.lower import NATIVE, LowerPass

__all__ = ["DecomposableAttentionPass", "InlineBodiesPass", "Prepared", "prepare"]

_INLINED = "capa.inlined"
_DECOMPOSABLE = "TRT_decomposable"


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """What was written, and what the builder has to be told of it."""

    weights: Sequence[dict[str, Any]]
    """Weights that became inputs of the network."""
    num_nodes: int
    """CAPA nodes that there are plugins for."""
    num_plugins: int
    """Those that have to become plugin layers: all or none."""


def prepare(
    onnx: Path,
    out: Path,
    *,
    external_weights: bool,
    plugins: bool,
    joined: bool = False,
    version: tuple[int, ...] | None = None,
) -> Prepared:
    """Write `out`, which finds its weights from the folder of `onnx`; reads no weight.

    Args:
        onnx: a graph as `export` writes it.
        out: the file to write.
        external_weights: whether large weights become inputs of the network.
        plugins: whether the CAPA nodes become plugin layers.
        joined: whether prefill is to be decode as well.
        version: of the TensorRT that reads it; None for TensorRT-RTX, which knows all our operators.

    Raises:
        CapaError: plugins are asked for, and not every node takes one.
    """
    model = ir.load(onnx)
    nodes = [node for node in model.graph if node.domain == DOMAIN and node.op_type in FUNCTIONS]
    if plugins and nodes and model.graph.inputs[0].dtype == ir.DataType.FLOAT:
        raise CapaError(
            f"{onnx}: is FP32, and plugins are for graphs in fp16 and bf16: build with --plugins none", ExitCode.ENGINE
        )
    if plugins and (without := sum(not _takes_plugin(node) for node in nodes)):
        raise CapaError(
            f"{onnx}: {without} of {len(nodes)} CAPA nodes take no plugin, as an earlier version wrote those in FP32: "
            "export again, or build with --plugins none",
            ExitCode.ENGINE,
        )
    passes: list[ir.passes.PassBase] = [JoinDecodePass() if joined else CacheBlocksPass()]
    if version is not None and version < NATIVE:
        passes += [LowerPass(version), InlineBodiesPass(plugins=plugins)]
    passes += [DecomposableAttentionPass(), DistinctInputsPass()]
    ir.passes.Sequential(*passes)(model)
    weights = movable_weights(model) if external_weights else []
    if external_weights:
        ExternalWeightsPass()(model)
    out.write_bytes(ir.to_proto(model).SerializeToString())
    return Prepared(
        weights=[asdict(weight) for weight in weights],
        num_nodes=len(nodes),
        num_plugins=len(nodes) if plugins else 0,
    )


class InlineBodiesPass(ir.passes.InPlacePass):
    """Puts the bodies of functions in the places of the nodes that call them, but for those that become plugin layers.

    TensorRT before 10.7 takes a body even where there is a plugin, and before 10.8 a value of the graph that has the
    name of a function's input stands in for it.

    Requires that a plugin is there for every CAPA node with the attributes of one, if plugins are asked for. Ensures
    that the model has no functions.

    Args:
        plugins: whether CAPA nodes with the attributes of plugins stay.
    """

    def __init__(self, *, plugins: bool) -> None:
        super().__init__()
        self.plugins = plugins

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = bool(model.functions)
        if self.plugins:
            _separate_bodies(model)
        InlinePass((lambda function: function.domain == _INLINED) if self.plugins else None)(model)
        model.functions.clear()
        return ir.passes.PassResult(model, modified=modified)


class DecomposableAttentionPass(ir.passes.InPlacePass):
    """Lets TensorRT decompose Attention, without which it fails where there is no fused kernel (FP32).

    Where there is one, it is used all the same. Ensures that every Attention node has the attribute.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        attentions = [node for node in model.graph.all_nodes() if node.op_type == "Attention"]
        nodes = [node for node in attentions if _DECOMPOSABLE not in node.attributes]
        for node in nodes:
            node.attributes.add(ir.AttrInt64(_DECOMPOSABLE, 1))
        return ir.passes.PassResult(model, modified=bool(nodes))


def _takes_plugin(node: ir.Node) -> bool:
    return node.domain == DOMAIN and PLUGIN.keys() <= node.attributes.keys()


def _separate_bodies(model: ir.Model) -> None:
    """Let the CAPA nodes that are no plugins call copies of their functions, to be told apart by their domain."""
    for node in model.graph:
        if node.domain == DOMAIN and not _takes_plugin(node):
            function = model.functions[node.op_identifier()]
            node.domain = _INLINED
            body = ir.Function(
                _INLINED, function.name, graph=function.graph.clone(), attributes=function.attributes.values()
            )
            model.functions[body.identifier()] = body
