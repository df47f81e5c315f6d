"""Compares a graph with its reference graph on one input: each layer's error, and the operator that begins it."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from capa_export.base.errors import CapaError
from capa_export.base.precision import FORMATS
from capa_export.parity.difference import node_difference
from capa_export.parity.graph_groups import GraphGroups, NodePair
from capa_export.parity.graph_runner import GraphRunner

__all__ = ["Culprit", "ErrorLimits", "ExpectedValue", "Run", "worst_row_error"]

_NODE_IN_MESSAGE = re.compile(r"Name:'([^']*)'")


@dataclass(frozen=True)
class ErrorLimits:
    """Largest relative errors that a precision explains."""

    floor: float
    """Limit of a layer's output, however small the eager model's own error is."""
    cap: float
    """Limit of a layer's output, however large the eager model's own error is: beyond it the precision is no good."""
    operator: float
    """Limit of an operator's output in a layer whose input is exact but for rounding."""

    @classmethod
    def of(cls, precision: str) -> "ErrorLimits":
        """Multiples of the rounding error; many in FP32, so that other kernels are not taken for other graphs."""
        epsilon = FORMATS[precision].epsilon
        return cls(1e-4, 1e-4, 1e-4) if precision == "fp32" else cls(epsilon, 32 * epsilon, 16 * epsilon)

    def over(self, noise: float) -> float:
        """Three times the eager model's own error in this precision, between `floor` and `cap`."""
        return min(max(3 * noise, self.floor), self.cap) if np.isfinite(noise) else self.cap


@dataclass(frozen=True)
class ExpectedValue:
    """The right value, with the error up to which another counts as equal."""

    value: np.ndarray
    limit: float
    """Largest `worst_row_error` from it."""


def worst_row_error(own: np.ndarray, wanted: np.ndarray) -> float:
    """Largest error of a row: || difference || over || wanted ||, or over the median row's norm where that is more.

    Infinite where shapes differ, numbers are not finite that should be, or integers are not the same.
    """
    if own.shape != wanted.shape:
        return np.inf
    if not np.issubdtype(wanted.dtype, np.floating):
        return 0.0 if np.array_equal(own, wanted) else np.inf
    a, b = (np.atleast_2d(array.astype(np.float64)) for array in (own, wanted))
    with np.errstate(invalid="ignore"):
        difference = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, a - b)
    if not np.isfinite(difference).all():
        return np.inf
    finite = np.where(np.isfinite(b), b, 0.0)
    errors, norms = (np.linalg.norm(array, axis=-1).reshape(-1) for array in (difference, finite))
    if not errors.size:
        return 0.0
    norms = np.maximum(norms, np.median(norms))
    return float((errors / np.maximum(norms, 1e-30)).max())


@dataclass(frozen=True)
class Culprit:
    """The operator at which a graph leaves its reference graph."""

    node: ir.Node
    """The node in the reference graph."""
    input_error: float
    output_error: float
    difference: str
    """Its difference from the reference node, as a clause; empty where only the precision differs."""
    finite: bool = True
    """Whether its output is finite wherever the reference's is."""
    largest: float = 0.0
    """Largest finite magnitude in the reference node's output."""
    bad_inputs: tuple[ir.Node, ...] = ()
    """Reference nodes that make those of its inputs that are wrong."""


@dataclass
class Run:
    """A graph and its reference graph on the same input; values are computed once."""

    file: str
    graphs: tuple[GraphRunner, GraphRunner]
    """The artefact's graphs, and the reference graphs."""
    cuts: tuple[GraphGroups, GraphGroups]
    feed: Mapping[str, np.ndarray]
    limits: ErrorLimits
    outputs: Mapping[str, ExpectedValue]
    """The graph's outputs with known values."""
    bounds: Mapping[int, ExpectedValue] = field(default_factory=dict)
    """Known rows of bounds, as `rows` picks them; the reference graph gives the others."""
    rows: Callable[[np.ndarray], np.ndarray] = lambda value: value
    """Picks the rows of a bound that `bounds` holds."""
    kept_rows: Sequence[np.ndarray] = ()
    scores: Sequence[ExpectedValue] = ()
    """Scores of each pruning stage."""
    limit: float = 0.0
    """Largest error of bounds that are not known."""
    _seen: dict[tuple[int, str], np.ndarray] = field(default_factory=dict)

    def own(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """Values of the artefact's graph."""
        return self._values(0, list(names))

    def reference(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """Values of the reference graph."""
        return self._values(1, list(names))

    def _values(self, side: int, names: Sequence[str]) -> dict[str, np.ndarray]:
        new = [name for name in names if (side, name) not in self._seen]
        if new:
            found = self.graphs[side].values(self.file, new, self.feed, self.kept_rows)
            self._seen |= {(side, name): array for name, array in found.items()}
        return {name: self._seen[side, name] for name in names}

    @property
    def layers(self) -> list[str]:
        return self.cuts[1].layers

    def bound_error(self, index: int) -> tuple[float, float]:
        """Error of a bound, and its limit; the error is infinite where the graph does not run up to there."""
        own, reference = (str(cut.bounds[index].name) for cut in self.cuts)
        expected = self.bounds.get(index)
        limit = self.limit if expected is None else expected.limit
        try:
            value = self.own([own])[own]
        except CapaError:
            return np.inf, limit
        if expected is None:
            return worst_row_error(value, self.reference([reference])[reference]), limit
        return worst_row_error(self.rows(value), expected.value), limit

    def reference_is_off(self, group: int) -> bool:
        """Whether a known value that leaves a group is wrong in the reference graph too."""
        pairs = [(str(place.name), self.outputs.get(place.name)) for place in self.cuts[1].places[group]]
        known = [(self.reference([name])[name], expected) for name, expected in pairs if expected is not None]
        if group in self.bounds:
            name = str(self.cuts[1].bounds[group].name)
            known.append((self.rows(self.reference([name])[name]), self.bounds[group]))
        return any(not worst_row_error(value, expected.value) <= expected.limit for value, expected in known)

    def _stages(self) -> list[tuple[int, ir.Node]]:
        """Group and TopKKeep node of each pruning stage."""
        reference = self.cuts[1]
        made = [
            (group, place) for group, places in enumerate(reference.places) for place in places if place.kind == "made"
        ]
        return [(group, reference.nodes[place.name]) for group, place in made]

    def first_look(self) -> None:
        """Compute in one run the outputs of the graph, of the last layer and of the stages.

        Raises:
            CapaError: ONNX Runtime cannot run it.
        """
        cut = self.cuts[0]
        stages = [cut.nodes[str(node.name)] for _, node in self._stages()]
        values = [value for node in stages for value in (node.outputs[0], node.inputs[0]) if value is not None]
        self.own(dict.fromkeys([*cut.outputs, str(cut.bounds[-1].name), *(str(value.name) for value in values)]))

    def bad_groups(self) -> list[int]:
        """Groups that a wrong cache, kept set or output of the graph leaves, in order."""
        groups: set[int] = set()
        own, reference = self.own(self.cuts[0].outputs), self.cuts[1]
        for group, places in enumerate(reference.places):
            for name in (place.name for place in places if place.kind == "output"):
                expected = self.outputs.get(name)
                if expected is None:
                    # A cache is known from the reference graph alone.
                    limit = max(self.limits.operator, self.bounds[group].limit if group in self.bounds else 0.0)
                    expected = ExpectedValue(self.reference(reference.outputs)[name], limit)
                if not worst_row_error(own[name], expected.value) <= expected.limit:
                    groups.add(group)
        stages = zip(self._stages(), self.scores, strict=True)
        return sorted(groups | {group for (group, node), expected in stages if not self._selects_well(node, expected)})

    def _selects_well(self, node: ir.Node, expected: ExpectedValue) -> bool:
        """Whether a stage's scores are right, and it keeps the tokens that these scores choose."""
        own = self.cuts[0].nodes[str(node.name)]
        scores, kept = (str(value.name) for value in (own.inputs[0], own.outputs[0]) if value is not None)
        seen = self.own([scores, kept])
        if not worst_row_error(seen[scores], expected.value) <= expected.limit:
            return False
        return np.array_equal(seen[kept], self._kept_of(node, seen[scores]))

    def _kept_of(self, node: ir.Node, scores: np.ndarray) -> np.ndarray:
        """Rows that the reference graph keeps by these scores: tokens flipped by rounding are no fault."""
        scored, kept = node.inputs[0], str(node.outputs[0].name)
        assert scored is not None
        given = {str(scored.name): scores}
        return self.graphs[1].values(self.file, [kept], self.feed, self.kept_rows, given)[kept]

    def culprit(self, group: int) -> Culprit | None:
        """The first operator of a group with a bad output, while both graphs are given the reference's group input."""
        try:
            found = list(self.operators(group))
        except CapaError as error:
            return self._stumble(str(error))
        for operator in found:
            if operator.output_error > self.limits.operator:
                # A second output of an earlier layer is first read here.
                earlier = (self._group_of(node) for node in operator.bad_inputs)
                elsewhere = (self.culprit(before) for before in earlier if before < group)
                return next((one for one in elsewhere if one is not None), operator)
        return None

    def operators(self, group: int) -> Iterator[Culprit]:
        """Every operator of a group, in order, with its errors.

        Raises:
            CapaError: ONNX Runtime cannot run it.
        """
        own, reference = self.cuts
        given: list[dict[str, np.ndarray]] = [{}, {}]
        if group > 1:
            names = [str(cut.bounds[group - 1].name) for cut in self.cuts]
            bound = self.reference(names[1:])[names[1]]
            given = [{name: bound} for name in names]
        pairs = own.pairs(reference, [0, 1] if group == 1 else [group])
        values = [value for pair in pairs for value in (*pair.inputs, *pair.outputs)]
        names_of = [dict.fromkeys(str(value[side].name) for value in values) for side in (1, 0)]
        seen = [
            opened.values(self.file, names, self.feed, self.kept_rows, bounds)
            for opened, names, bounds in zip(self.graphs, names_of, given, strict=True)
        ]
        for pair in pairs:
            if pair.node.op_type == "TopKKeep" and pair.inputs:
                scores = seen[0][str(pair.inputs[0][1].name)]
                seen[1][str(pair.node.outputs[0].name)] = self._kept_of(pair.node, scores)
            yield self._operator(pair, *seen)

    def _operator(self, pair: NodePair, own: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray]) -> Culprit:
        inputs, outputs = (
            [(value, own[str(mine.name)], reference[str(value.name)]) for value, mine in values]
            for values in (pair.inputs, pair.outputs)
        )
        errors = [worst_row_error(mine, wanted) for _, mine, wanted in inputs]
        bad = [
            value.producer() for (value, *_), error in zip(inputs, errors, strict=True) if error > self.limits.operator
        ]
        return Culprit(
            pair.node,
            max(errors, default=0.0),
            max((worst_row_error(mine, wanted) for _, mine, wanted in outputs), default=0.0),
            node_difference(pair.node, *self.cuts),
            all(np.isfinite(mine).all() for _, mine, wanted in outputs if np.isfinite(wanted).all()),
            max((_largest(wanted) for *_, wanted in outputs), default=0.0),
            tuple(producer for producer in bad if producer is not None),
        )

    def _group_of(self, node: ir.Node) -> int:
        return next(group for group, nodes in enumerate(self.cuts[1].groups) if node in nodes)

    def _stumble(self, message: str) -> Culprit | None:
        """The node at which ONNX Runtime stops, as its message names it."""
        found = _NODE_IN_MESSAGE.search(message)
        node = self.cuts[1].nodes.get(found[1]) if found else None
        if node is None:
            return None
        difference = node_difference(node, *self.cuts) or "ONNX Runtime fails to run it"
        return Culprit(node, np.inf, np.inf, difference)

    def changed(self, groups: Iterable[int]) -> Culprit | None:
        """The first node of these groups that differs from its reference node, whatever its output."""
        for group in groups:
            for node in self.cuts[1].groups[group]:
                if difference := node_difference(node, *self.cuts):
                    return Culprit(node, 0.0, 0.0, difference)
        return None

    def beyond(self, limit: float) -> dict[ir.Node, float]:
        """Reference nodes behind the embeddings whose outputs exceed a number, with their largest magnitudes."""
        reference, found = self.cuts[1], dict[ir.Node, float]()
        given: dict[str, np.ndarray] = {}
        # One layer at a time, so that no more than its values are held.
        for group in range(1, len(reference.groups)):
            made = {
                str(value.name): node for node in reference.groups[group] for value in node.outputs if _is_float(value)
            }
            bounds = [str(bound.name) for bound in reference.bounds[group : group + 1]]
            seen = self.graphs[1].values(self.file, [*made, *bounds], self.feed, self.kept_rows, given)
            for name, node in made.items():
                if (largest := _largest(seen[name])) > limit:
                    found[node] = max(found.get(node, 0.0), largest)
            given = {name: seen[name] for name in bounds}
        return found


def _largest(array: np.ndarray) -> float:
    """The largest finite magnitude; 0 where there is none."""
    return float(np.abs(array[np.isfinite(array)]).max(initial=0.0))


def _is_float(value: ir.Value) -> bool:
    producer = value.producer()
    made = producer is not None and producer.op_type != "Constant"
    return made and value.dtype == ir.DataType.FLOAT and bool(value.uses())
