"""A graph in groups of nodes, beside its reference graph: the same written anew in FP32, with the same node names."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from capa_export.config.parts import layer_of
from capa_export.graph.contract import present_names

__all__ = ["GraphGroups", "NodePair", "ValuePlace"]


@dataclass(frozen=True)
class ValuePlace:
    """The place of a value in either of two graphs with the same node names."""

    kind: Literal["read", "made", "output"]
    """Read by a node, made by a node, or an output of the graph."""
    name: str
    """Name of the node or the output."""
    index: int = 0
    """Index of the node's input or output."""


@dataclass(frozen=True)
class NodePair:
    """A node of the reference graph, with its values and those in their places in the other graph."""

    node: ir.Node
    inputs: Sequence[tuple[ir.Value, ir.Value]]
    """(reference, other) values of the inputs that other nodes compute."""
    outputs: Sequence[tuple[ir.Value, ir.Value]]
    """(reference, other) values of the outputs that are used."""


class GraphGroups:
    """One graph in groups of nodes: group 0 precedes the layers, l + 1 is layer l, and L + 1 follows the last layer.

    Bound l is the value that enters layer l; bound L leaves the last layer.
    """

    def __init__(self, model: ir.Model, reference: "GraphGroups | None" = None) -> None:
        """Cut `model` at the nodes where `reference` is cut; not at all where one of these is missing."""
        self.model = model
        self.nodes = {str(node.name): node for node in model.graph}
        self.outputs = {str(value.name): value for value in model.graph.outputs}
        self.layers: list[str] = _layers(model) if reference is None else reference.layers
        self.places: list[list[ValuePlace]] = self._targets() if reference is None else reference.places
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

    def _targets(self) -> list[list[ValuePlace]]:
        """Places of the values that leave each group, its bound first."""
        first: dict[str, ir.Node] = {}
        for node in self.model.graph:
            first.setdefault(layer_of(str(node.name)), node)
        bounds = [ValuePlace("read", str(first[layer].name), 0) for layer in self.layers]
        bounds.append(self._reader_of(self.layers[-1]))
        groups = [[bound] for bound in bounds]
        for index, layer in enumerate(self.layers):
            kept = [
                node for node in self.model.graph if node.op_type == "TopKKeep" and layer_of(str(node.name)) == layer
            ]
            cached = [name for name in present_names(index) if name in self.outputs]
            groups[index + 1] += [ValuePlace("made", str(node.name)) for node in kept]
            groups[index + 1] += [ValuePlace("output", name) for name in cached]
        known = {place.name for group in groups for place in group if place.kind == "output"}
        return [*groups, [ValuePlace("output", name) for name in self.outputs if name not in known]]

    def _reader_of(self, layer: str) -> ValuePlace:
        """The place that reads the output of the last layer, with the DeepStack features that joined it."""
        made_there = (value for node in self.model.graph if layer_of(str(node.name)) == layer for value in node.outputs)
        readers = (use for value in made_there for use in value.uses() if not layer_of(str(use.node.name)))
        reader = next(readers)
        while reader.node.op_type == "Add":
            reader = next(iter(reader.node.outputs[0].uses()))
        return ValuePlace("read", str(reader.node.name), reader.idx)

    def value(self, place: ValuePlace) -> ir.Value | None:
        """The value at a place of this graph; None where the graph has no such place."""
        if place.kind == "output":
            return self.outputs.get(place.name)
        node = self.nodes.get(place.name)
        values = () if node is None else node.inputs if place.kind == "read" else node.outputs
        return values[place.index] if place.index < len(values) else None

    def named(self, name: str) -> ir.Value | None:
        """The value of this name; None where no output of the graph needs it."""
        return self._live_values.get(name)

    def _found(self, place: ValuePlace) -> ir.Value:
        value = self.value(place)
        assert value is not None, place
        return value

    def pairs(self, reference: "GraphGroups", groups: Iterable[int]) -> list[NodePair]:
        """The reference's nodes of some groups, in order, with the values in their places here."""
        nodes = [node for group in groups for node in reference.groups[group]]
        return [
            NodePair(node, list(self._inputs(node)), list(self._outputs(reference, node)))
            for node in nodes
            if node.op_type != "Constant"
        ]

    def _inputs(self, node: ir.Node) -> Iterable[tuple[ir.Value, ir.Value]]:
        if str(node.name) in self.live:
            for index, value in enumerate(node.inputs):
                own = self.value(ValuePlace("read", str(node.name), index))
                if value is not None and own is not None and _computed(value) and _computed(own):
                    yield value, own

    def _outputs(self, reference: "GraphGroups", node: ir.Node) -> Iterable[tuple[ir.Value, ir.Value]]:
        targets = {reference.value(place): place for group in reference.places for place in group}
        for index, value in enumerate(node.outputs):
            if not value.uses() and value not in targets:
                continue
            # By name first: a value that took the place of another one keeps its name.
            own = self._live_values.get(str(value.name))
            places = [ValuePlace("made", str(node.name), index)] if str(node.name) in self.live else []
            places += [
                ValuePlace("read", str(user.name), at) for user, at in value.uses() if str(user.name) in self.live
            ]
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
