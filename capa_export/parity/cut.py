"""A graph cut at its layers, beside its twin: the same graph written anew in FP32, with the same node names."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from capa_export.base.errors import CapaError
from capa_export.config.parts import layer_of
from capa_export.export.graphs import Graphs
from capa_export.graph.contract import present_names
from capa_export.parity.probe import forced
from capa_export.run.onnx import NUMPY_TYPES, OnnxModel

__all__ = ["Cut", "Opened", "Pair", "Place"]


@dataclass(frozen=True)
class Place:
    """Where a value is found in either of two graphs with the same node names."""

    kind: Literal["read", "made", "output"]
    """Read by a node, made by a node, or an output of the graph."""
    name: str
    """Of the node or the output."""
    index: int = 0
    """Of the node's input or output."""


@dataclass(frozen=True)
class Pair:
    """A node of the twin, its inputs and outputs, and the values in their places in the other graph."""

    node: ir.Node
    inputs: Sequence[tuple[ir.Value, ir.Value]]
    """Those that nodes make."""
    outputs: Sequence[tuple[ir.Value, ir.Value]]


class Cut:
    """One graph in groups of nodes: what precedes the layers (0), layer l (l + 1), and what follows (L + 1).

    Bound l enters layer l, and bound L leaves the last one.
    """

    def __init__(self, model: ir.Model, twin: "Cut | None" = None) -> None:
        """Cut `model`, at the nodes at which its twin was cut; not at all where one of these is missing."""
        self.model = model
        self.nodes = {str(node.name): node for node in model.graph}
        self.outputs = {str(value.name): value for value in model.graph.outputs}
        self.layers: list[str] = _layers(model) if twin is None else twin.layers
        self.places: list[list[Place]] = self._targets() if twin is None else twin.places
        places = [place for group in self.places for place in group]
        self.missing = next((place.name for place in places if self.value(place) is None), "")
        self.bounds: list[ir.Value] = []
        self.groups: list[list[ir.Node]] = []
        if not self.missing:
            self._cut()
        self.live = {str(node.name) for group in self.groups for node in group}
        self._live_values = {
            str(value.name): value for group in self.groups for node in group for value in node.outputs
        }

    def _cut(self) -> None:
        self.bounds = [self._found(group[0]) for group in self.places[:-1]]
        position = {node: index for index, node in enumerate(self.model.graph)}
        known: set[ir.Node] = set()
        for group in self.places:
            new = _ancestors([self._found(place) for place in group], known)
            self.groups.append(sorted(new, key=position.__getitem__))
            known |= new

    def _targets(self) -> list[list[Place]]:
        """Per group what leaves it, its bound first."""
        first: dict[str, ir.Node] = {}
        for node in self.model.graph:
            first.setdefault(layer_of(str(node.name)), node)
        bounds = [Place("read", str(first[layer].name), 0) for layer in self.layers]
        bounds.append(self._reader_of(self.layers[-1]))
        groups = [[bound] for bound in bounds]
        for index, layer in enumerate(self.layers):
            kept = [
                node for node in self.model.graph if node.op_type == "TopKKeep" and layer_of(str(node.name)) == layer
            ]
            cached = [name for name in present_names(index) if name in self.outputs]
            groups[index + 1] += [Place("made", str(node.name)) for node in kept]
            groups[index + 1] += [Place("output", name) for name in cached]
        known = {place.name for group in groups for place in group if place.kind == "output"}
        return [*groups, [Place("output", name) for name in self.outputs if name not in known]]

    def _reader_of(self, layer: str) -> Place:
        """What reads the output of the last layer, with the DeepStack features that joined it."""
        made_there = (value for node in self.model.graph if layer_of(str(node.name)) == layer for value in node.outputs)
        readers = (use for value in made_there for use in value.uses() if not layer_of(str(use.node.name)))
        reader = next(readers)
        while reader.node.op_type == "Add":
            reader = next(iter(reader.node.outputs[0].uses()))
        return Place("read", str(reader.node.name), reader.idx)

    def value(self, place: Place) -> ir.Value | None:
        """What stands there in this graph, if anything does."""
        if place.kind == "output":
            return self.outputs.get(place.name)
        node = self.nodes.get(place.name)
        values = () if node is None else node.inputs if place.kind == "read" else node.outputs
        return values[place.index] if place.index < len(values) else None

    def named(self, name: str) -> ir.Value | None:
        """The value of this name, if an output of the graph needs it."""
        return self._live_values.get(name)

    def _found(self, place: Place) -> ir.Value:
        value = self.value(place)
        assert value is not None, place
        return value

    def pairs(self, twin: "Cut", groups: Iterable[int]) -> list[Pair]:
        """The twin's nodes of some groups, in order, beside what stands in their places here."""
        nodes = [node for group in groups for node in twin.groups[group]]
        return [
            Pair(node, list(self._inputs(node)), list(self._outputs(twin, node)))
            for node in nodes
            if node.op_type != "Constant"
        ]

    def _inputs(self, node: ir.Node) -> Iterable[tuple[ir.Value, ir.Value]]:
        if str(node.name) in self.live:
            for index, value in enumerate(node.inputs):
                own = self.value(Place("read", str(node.name), index))
                if value is not None and own is not None and _computed(value) and _computed(own):
                    yield value, own

    def _outputs(self, twin: "Cut", node: ir.Node) -> Iterable[tuple[ir.Value, ir.Value]]:
        targets = {twin.value(place): place for group in twin.places for place in group}
        for index, value in enumerate(node.outputs):
            if not value.uses() and value not in targets:
                continue
            # Whatever carries its name: a value that took the place of another one keeps it.
            own = self._live_values.get(str(value.name))
            places = [Place("made", str(node.name), index)] if str(node.name) in self.live else []
            places += [Place("read", str(user.name), at) for user, at in value.uses() if str(user.name) in self.live]
            places += [targets[value]] if value in targets else []
            own = own or next((found for place in places if (found := self.value(place)) is not None), None)
            if own is not None and _computed(own):
                yield value, own


def _layers(model: ir.Model) -> list[str]:
    names = dict.fromkeys(layer_of(str(node.name)) for node in model.graph)
    return sorted((name for name in names if name), key=lambda name: int(name.rpartition(".")[2]))


def _computed(value: ir.Value) -> bool:
    producer = value.producer()
    return producer is not None and producer.op_type != "Constant"


def _ancestors(values: Iterable[ir.Value], known: set[ir.Node]) -> set[ir.Node]:
    found: set[ir.Node] = set()
    open_values = list(values)
    while open_values:
        producer = open_values.pop().producer()
        if producer is not None and producer not in found and producer not in known:
            found.add(producer)
            open_values += [value for value in producer.inputs if value is not None]
    return found


class Opened(OnnxModel):
    """The graphs of an `onnx/` folder, any value of which can be seen or given; in prefill, kept rows are given."""

    def __init__(self, graphs: Path | Graphs, *, sliced: bool = False) -> None:
        super().__init__(graphs, sliced=sliced)
        self._key: Any = None
        self._rows: list[str] = []
        self._known: dict[tuple[Any, ...], np.ndarray] = {}

    def graph(self, file: str) -> ir.Model:
        """As it is cut and run: in prefill, kept rows are inputs."""
        model = self._graph(file)
        forced(model)
        return model

    def values(
        self,
        file: str,
        names: Iterable[str],
        feed: Mapping[str, np.ndarray],
        kept_rows: Sequence[np.ndarray] = (),
        given: Mapping[str, np.ndarray] = MappingProxyType({}),
    ) -> dict[str, np.ndarray]:
        """Values by name; only what they need is run.

        Args:
            file: of the graph.
            names: of the values.
            feed: the graph's inputs, floats in any precision.
            kept_rows: what each stage keeps, of the rows that enter it.
            given: what the readers of some values find there instead.

        Raises:
            CapaError: ONNX Runtime fails.
        """
        wanted = list(dict.fromkeys(names))
        key = file, tuple(wanted), tuple(given)
        if key != self._key:
            self._sessions.pop(file, None)
            self._key = key
        session = self._opened(file, {name: array.shape for name, array in feed.items()})
        rows = dict(zip(self._rows, kept_rows, strict=False))
        everything = {**feed, **rows, **{_given(name): array for name, array in given.items()}}
        try:
            inputs = {
                entry.name: everything[entry.name].astype(NUMPY_TYPES[entry.type]) for entry in session.get_inputs()
            }
            return dict(zip(wanted, session.run(wanted, inputs), strict=True))
        except Exception as error:  # ONNX Runtime's exceptions share no public base class.
            raise CapaError(
                f"{self.folder / file}: ONNX Runtime cannot run it: {str(error).splitlines()[0]}"
            ) from error

    def _changes(self, file: str) -> Sequence[Any]:  # noqa: ARG002 - `values` has opened it.
        return [partial(self._narrow, *self._key[1:])]

    def _narrow(self, names: Sequence[str], given: Sequence[str], model: ir.Model) -> None:
        graph = model.graph
        num_inputs = len(graph.inputs)
        forced(model)
        self._rows = [str(value.name) for value in graph.inputs[num_inputs:]]
        values = {str(value.name): value for node in graph for value in node.outputs}
        for name in given:
            value = values[name]
            stand_in = ir.val(_given(name), dtype=value.dtype or graph.inputs[0].dtype)
            graph.inputs.append(stand_in)
            for user, index in tuple(value.uses()):
                user.replace_input_with(index, stand_in)
        graph.outputs[:] = [values[name] for name in names]
        RemoveUnusedNodesPass()(model)


def _given(name: str) -> str:
    return f"{name}/given"
