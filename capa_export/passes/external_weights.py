"""Turns the weights of a graph into network inputs, so that engines share one copy of them on the device."""

from dataclasses import dataclass

import onnx_ir as ir

from capa_export.base.errors import CapaError, ExitCode
from capa_export.passes.pack_weights import only_gemm_reads

__all__ = ["MIN_WEIGHT_BYTES", "ExternalWeight", "ExternalWeightsPass", "movable_weights"]

MIN_WEIGHT_BYTES = 64 * 1024
"""Smaller tensors stay in the plan: an input costs more to bind than they take."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExternalWeight:
    """A network input that holds a weight, and where its bytes lie."""

    name: str
    location: str
    """Data file, relative to the folder of the ONNX file."""
    offset: int
    length: int
    dtype: str
    shape: tuple[int, ...]


def movable_weights(model: ir.Model) -> list[ExternalWeight]:
    """The weights that `ExternalWeightsPass` moves, without reading their bytes.

    Raises:
        CapaError: one of them lies in the ONNX file itself.
    """
    return [_external(model.graph, value) for value in model.graph.initializers.values() if _moves(value)]


class ExternalWeightsPass(ir.passes.InPlacePass):
    """Makes network inputs of the large weights.

    A weight moves when it has `MIN_WEIGHT_BYTES` or more and all its readers take it as B of a `Gemm(transB=1)`: only
    these are multiplied where they lie. One that is also read otherwise (the output projection of a layer that
    prunes, by the body that scores or by its plugin) stays a constant, or TensorRT would transpose or cast it in every
    run.

    Requires that weights lie beside the ONNX file, and that whoever wants `movable_weights` has asked before. Ensures
    that no initializer moves any more; the inputs that were there stay in front.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        moved = movable_weights(model)
        for weight in moved:
            value = graph.initializers.pop(weight.name)
            value.const_value = None
            graph.inputs.append(value)
        return ir.passes.PassResult(model, modified=bool(moved))


def _moves(value: ir.Value) -> bool:
    tensor = value.const_value
    return tensor is not None and tensor.nbytes >= MIN_WEIGHT_BYTES and only_gemm_reads(value)


def _external(graph: ir.Graph, value: ir.Value) -> ExternalWeight:
    tensor = value.const_value
    if not isinstance(tensor, ir.ExternalTensor) or tensor.length is None:
        raise CapaError(
            f"{graph.name}: the bytes of {value.name} are in the ONNX file; external weights need a graph saved "
            "with external data",
            ExitCode.ENGINE,
        )
    return ExternalWeight(
        name=tensor.name,
        location=str(tensor.location),
        offset=tensor.offset or 0,
        length=tensor.length,
        dtype=tensor.dtype.name,
        shape=tuple(tensor.shape.numpy()),
    )
