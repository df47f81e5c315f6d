"""A graph that runs slice by slice, so that no more than one layer's weights are in memory.

A slice is what precedes the layers, a layer of the decoder or a block of the tower, or what follows them.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import numpy as np
import onnx
import onnx_ir as ir

from capa_export.base.weight_types import WEIGHT_TYPES
from capa_export.config.parts import layer_of
from capa_export.run.onnx import NUMPY_TYPES

__all__ = ["NodeArg", "SlicedSession", "run_lanes", "without_lazy_weights"]

Feed = Mapping[str, np.ndarray]

_DTYPES = {name: ir.DataType.from_numpy(np.dtype(dtype)) for name, dtype in NUMPY_TYPES.items()}
_TYPES = {dtype: name for name, dtype in _DTYPES.items()}
_FEW_BITS = {ir.DataType[kind.onnx] for kind in WEIGHT_TYPES.values()}


@dataclass(frozen=True)
class NodeArg:
    """An input or output of a session, with the fields of ONNX Runtime's `NodeArg`."""

    name: str
    type: str
    shape: Sequence[int | str | None]


@runtime_checkable
class ChunkedTensor(Protocol):
    """A lazy tensor whose elements can be had a piece at a time."""

    def chunks(self) -> Iterator[np.ndarray]:
        """Yield them in order, flat."""
        ...


@dataclass(frozen=True)
class _Slice:
    """Nodes that run together."""

    reads: tuple[ir.Value, ...]
    """Values made by earlier slices, or inputs of the graph."""
    leaves: tuple[ir.Value, ...]
    """Values read by later slices, or outputs of the graph."""


class SlicedSession:
    """Stands where ONNX Runtime's session of a graph would.

    Args:
        model: the graph; weights that are lazy are read when their slice runs, others are ONNX Runtime's to find.
        connect: opens ONNX Runtime's session of a slice.
    """

    def __init__(self, model: ir.Model, connect: Callable[[onnx.ModelProto], Any]) -> None:
        self.model, self.connect = model, connect
        self._spare = defaultdict[tuple[tuple[int, ...], ir.DataType], list[np.ndarray]](list)
        self._types = {
            str(value.name): _TYPES.get(value.dtype or ir.DataType.UNDEFINED, "") for value in _inputs(model)
        }

    def get_inputs(self) -> list[NodeArg]:
        """The graph's inputs."""
        return [_node_arg(value) for value in _inputs(self.model)]

    def get_outputs(self) -> list[NodeArg]:
        """The graph's outputs."""
        return [_node_arg(value) for value in self.model.graph.outputs]

    def run(self, names: Sequence[str], feed: Feed) -> list[np.ndarray]:
        """Run the graph once; returns the named outputs."""
        found = self.run_lanes(names, [[feed]])[0][0]
        return [found[name] for name in names]

    def run_lanes(
        self, names: Sequence[str], lanes: Sequence[Sequence[Feed]], carried: Mapping[str, str] = MappingProxyType({})
    ) -> list[list[dict[str, np.ndarray]]]:
        """Outputs of many runs, each slice opened once for all of them.

        Args:
            names: of the outputs.
            lanes: inputs of runs that follow each other; those behind a lane's first lack what is carried to them.
            carried: input that is an output of the run before it -> that output.
        """
        values: list[list[dict[str, np.ndarray]]] = [[dict(feed) for feed in lane] for lane in lanes]
        last_use = self._last_uses({*names})
        for number, part in enumerate(self._slices):
            session, weights = self._open(part)
            leaves = [str(value.name) for value in part.leaves]
            reads = [entry.name for entry in session.get_inputs() if entry.name not in weights]
            for lane in values:
                before: dict[str, np.ndarray] = {}
                for own in lane:
                    given = {name: own[name] if name in own else before[carried[name]] for name in reads}
                    own.update(zip(leaves, session.run(leaves, {**given, **weights}), strict=True))
                    before = {name: own[name] for name in carried.values() if name in own}
                for own in lane:
                    for name in [name for name in own if last_use.get(name, -1) <= number]:
                        del own[name]
            del session, weights
        self._spare.clear()
        return values

    def _last_uses(self, wanted: set[str]) -> dict[str, float]:
        """The number of the last slice that reads a value; past all of them where it is asked for."""
        found: dict[str, float] = {}
        for number, part in enumerate(self._slices):
            found |= {str(value.name): number for value in part.reads}
        return found | dict.fromkeys(wanted, np.inf)

    def _open(self, part: _Slice) -> tuple[Any, dict[str, np.ndarray]]:
        """A slice's session, and the weights to feed it."""
        graph = ir.convenience.extract(self.model.graph, part.reads, part.leaves)
        for value in graph.inputs:
            value.type = value.type or ir.TensorType(_DTYPES[self._types[str(value.name)]])
        model = ir.Model(graph, ir_version=self.model.ir_version, functions=[*self.model.functions.values()])
        # ONNX Runtime fuses products with constants of few bits only; a layer's are little enough to go with its graph.
        weights = self._read(_fed_weights(model))
        session = self.connect(ir.to_proto(_with_inputs(model, weights)))
        self._types |= {entry.name: entry.type for entry in session.get_outputs()}
        return session, weights

    def _read(self, lazy: Mapping[str, ir.LazyTensor]) -> dict[str, np.ndarray]:
        """Weights, in the memory of those of the slice before it where these were as large: faster than new memory."""
        spare, self._spare = self._spare, defaultdict(list)
        weights: dict[str, np.ndarray] = {}
        for name, tensor in lazy.items():
            if isinstance(tensor, ChunkedTensor):
                key = tuple(tensor.shape.numpy()), tensor.dtype
                weights[name] = spare[key].pop() if spare[key] else np.empty(key[0], tensor.dtype.numpy())
                _fill(weights[name].reshape(-1), tensor.chunks())
                self._spare[key].append(weights[name])
            else:
                weights[name] = tensor.numpy()
        return weights

    @cached_property
    def _slices(self) -> list[_Slice]:
        groups = _groups(self.model.graph)
        numbers = sorted({*groups.values()})
        outputs = {*self.model.graph.outputs}
        slices: list[_Slice] = []
        for number in numbers:
            nodes = [node for node in self.model.graph if groups.get(node) == number]
            made = {value for node in nodes for value in node.outputs}
            read = dict.fromkeys(value for node in nodes for value in node.inputs if value is not None)
            reads = tuple(value for value in read if value not in made and not value.is_initializer())
            leaves = tuple(
                value
                for node in nodes
                for value in node.outputs
                if value in outputs or any(groups.get(user, number) != number for user, _ in value.uses())
            )
            slices.append(_Slice(reads, leaves))
        return slices


def _fill(flat: np.ndarray, chunks: Iterable[np.ndarray]) -> None:
    done = 0
    for chunk in chunks:
        flat[done : done + chunk.size] = chunk
        done += chunk.size


def without_lazy_weights(model: ir.Model) -> ir.Model:
    """Turn a model's lazy weights into inputs, in place; returns the model."""
    return _with_inputs(model, _lazy_weights(model))


def _with_inputs(model: ir.Model, weights: Iterable[str]) -> ir.Model:
    """Turn the weights of these names into inputs, in place; returns the model."""
    graph = model.graph
    for name in weights:
        value = graph.initializers.pop(name)
        value.const_value = None
        graph.inputs.append(value)
    return model


def _fed_weights(model: ir.Model) -> dict[str, ir.LazyTensor]:
    """The lazy weights but those of few bits, and what dequantizes these: ONNX Runtime fuses constants alone."""
    lazy, values = _lazy_weights(model), model.graph.initializers
    packed = (values[name] for name, tensor in lazy.items() if tensor.dtype in _FEW_BITS)
    dequantizing = {node for value in packed for node, _ in value.uses()}
    return {
        name: tensor
        for name, tensor in lazy.items()
        if tensor.dtype not in _FEW_BITS and dequantizing.isdisjoint(node for node, _ in values[name].uses())
    }


def _lazy_weights(model: ir.Model) -> dict[str, ir.LazyTensor]:
    tensors = ((name, value.const_value) for name, value in model.graph.initializers.items())
    return {name: tensor for name, tensor in tensors if isinstance(tensor, ir.LazyTensor)}


def run_lanes(
    session: Any,
    names: Sequence[str],
    lanes: Sequence[Sequence[Feed]],
    carried: Mapping[str, str] = MappingProxyType({}),
    timing: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> list[list[dict[str, np.ndarray]]]:
    """Run lanes as `SlicedSession.run_lanes` does, in any session; `timing` times each run of one that is whole."""
    if isinstance(session, SlicedSession):
        return session.run_lanes(names, lanes, carried)
    everything = [*dict.fromkeys([*names, *carried.values()])]
    results: list[list[dict[str, np.ndarray]]] = []
    for lane in lanes:
        found: list[dict[str, np.ndarray]] = []
        before: dict[str, np.ndarray] = {}
        for feed in lane:
            given = {**{name: before[output] for name, output in carried.items() if output in before}, **feed}
            with timing():
                before = dict(zip(everything, session.run(everything, given), strict=True))
            found.append({name: before[name] for name in names})
        results.append(found)
    return results


def _groups(graph: ir.Graph) -> dict[ir.Node, int]:
    """The number of every node's slice: its layer's, or outside layers that of the first one that reads it."""
    layers = {name: number for number, name in enumerate(dict.fromkeys(layer_of(str(node.name)) for node in graph))}
    groups: dict[ir.Node, int] = {}
    outputs = {*graph.outputs}
    for node in reversed(graph):
        users = [groups[user] for value in node.outputs for user, _ in value.uses() if user in groups]
        if any(value in outputs for value in node.outputs):
            users.append(len(layers))
        if users:
            layer = layer_of(str(node.name))
            groups[node] = layers[layer] if layer else min(users)
    return groups


def _inputs(model: ir.Model) -> list[ir.Value]:
    """The inputs of a graph, without weights that are declared as inputs too."""
    return [value for value in model.graph.inputs if not value.is_initializer()]


def _node_arg(value: ir.Value) -> NodeArg:
    assert value.name is not None and value.dtype is not None
    dims = () if value.shape is None else value.shape
    shape = [dim if isinstance(dim, int) else dim.value for dim in dims]
    return NodeArg(value.name, _TYPES.get(value.dtype, str(value.dtype)), shape)
