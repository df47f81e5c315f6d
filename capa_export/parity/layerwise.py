"""One graph on one input, run beside its twin: how far each layer's output is off, and which operator starts it."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from capa_export.base.errors import CapaError
from capa_export.base.precision import FORMATS
from capa_export.parity.cut import Cut, Opened, Pair
from capa_export.parity.difference import node_difference

__all__ = ["Culprit", "Expected", "Limits", "Run", "relative_error"]

_NODE_IN_MESSAGE = re.compile(r"Name:'([^']*)'")


@dataclass(frozen=True)
class Limits:
    """Relative errors that a precision explains."""

    floor: float
    """Of a layer's output, however little the eager model's own is off."""
    cap: float
    """Of a layer's output, however much the eager model's own is off: beyond it the precision is no good."""
    operator: float
    """Of an operator's output in a layer whose input is exact but for rounding."""

    @classmethod
    def of(cls, precision: str) -> "Limits":
        """Multiples of the rounding error: of FP32 many, which tell other kernels from other graphs."""
        epsilon = FORMATS[precision].epsilon
        return cls(1e-4, 1e-4, 1e-4) if precision == "fp32" else cls(epsilon, 32 * epsilon, 16 * epsilon)

    def over(self, noise: float) -> float:
        """Three times what the eager model shows in this precision, within reason."""
        return min(max(3 * noise, self.floor), self.cap) if np.isfinite(noise) else self.cap


@dataclass(frozen=True)
class Expected:
    """What a value should be."""

    value: np.ndarray
    limit: float
    """Relative error up to which it is."""


def relative_error(own: np.ndarray, wanted: np.ndarray) -> float:
    """Largest of a row: || difference || over || wanted ||, or over the median row's where that is more.

    Infinite where the shapes differ, a number is not finite that should be, or whole numbers are not the same.
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
    """The operator at which a graph leaves its twin."""

    node: ir.Node
    """Of the twin."""
    input_error: float
    output_error: float
    difference: str
    """What it says otherwise, as a clause; empty where only the precision differs."""
    finite: bool = True
    """Whether its output is."""
    largest: float = 0.0
    """Magnitude in the twin's output."""
    bad_inputs: tuple[ir.Node, ...] = ()
    """Nodes of the twin whose outputs it reads otherwise."""


@dataclass
class Run:
    """A graph and its twin on the same input; everything that was seen is kept."""

    file: str
    graphs: tuple[Opened, Opened]
    """The artefact's, and the twin's."""
    cuts: tuple[Cut, Cut]
    feed: Mapping[str, np.ndarray]
    limits: Limits
    outputs: Mapping[str, Expected]
    """Outputs of the graph whose values are known."""
    bounds: Mapping[int, Expected] = field(default_factory=dict)
    """Bounds that are known, as `rows` takes them; the twin says what others should be."""
    rows: Callable[[np.ndarray], np.ndarray] = lambda value: value
    """Those rows of a bound of which `bounds` tells."""
    kept_rows: Sequence[np.ndarray] = ()
    scores: Sequence[Expected] = ()
    """Per stage."""
    limit: float = 0.0
    """Of bounds that are not known."""
    _seen: dict[tuple[int, str], np.ndarray] = field(default_factory=dict)

    def own(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """Values of the artefact's graph."""
        return self._values(0, list(names))

    def twin(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """Values of the twin."""
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
        """Error of a bound, and its limit; an infinite one where the graph cannot be run up to there."""
        own, twin = (str(cut.bounds[index].name) for cut in self.cuts)
        expected = self.bounds.get(index)
        limit = self.limit if expected is None else expected.limit
        try:
            value = self.own([own])[own]
        except CapaError:
            return np.inf, limit
        if expected is None:
            return relative_error(value, self.twin([twin])[twin]), limit
        return relative_error(self.rows(value), expected.value), limit

    def twin_is_off(self, group: int) -> bool:
        """Whether what leaves a group of the twin is not what is known of it."""
        pairs = [(str(place.name), self.outputs.get(place.name)) for place in self.cuts[1].places[group]]
        known = [(self.twin([name])[name], expected) for name, expected in pairs if expected is not None]
        if group in self.bounds:
            name = str(self.cuts[1].bounds[group].name)
            known.append((self.rows(self.twin([name])[name]), self.bounds[group]))
        return any(not relative_error(value, expected.value) <= expected.limit for value, expected in known)

    def _stages(self) -> list[tuple[int, ir.Node]]:
        """Group and TopKKeep node of each pruning stage."""
        twin = self.cuts[1]
        made = [(group, place) for group, places in enumerate(twin.places) for place in places if place.kind == "made"]
        return [(group, twin.nodes[place.name]) for group, place in made]

    def first_look(self) -> None:
        """See in one run all that leaves the graph, the last layer and the stages.

        Raises:
            CapaError: ONNX Runtime cannot run it.
        """
        cut = self.cuts[0]
        stages = [cut.nodes[str(node.name)] for _, node in self._stages()]
        values = [value for node in stages for value in (node.outputs[0], node.inputs[0]) if value is not None]
        self.own(dict.fromkeys([*cut.outputs, str(cut.bounds[-1].name), *(str(value.name) for value in values)]))

    def bad_groups(self) -> list[int]:
        """Groups from which a cache, a kept set or an output of the graph leaves that should not, in order."""
        groups: set[int] = set()
        own, twin = self.own(self.cuts[0].outputs), self.cuts[1]
        for group, places in enumerate(twin.places):
            for name in (place.name for place in places if place.kind == "output"):
                expected = self.outputs.get(name)
                if expected is None:
                    # Of a cache nothing is known but what the twin has in it.
                    limit = max(self.limits.operator, self.bounds[group].limit if group in self.bounds else 0.0)
                    expected = Expected(self.twin(twin.outputs)[name], limit)
                if not relative_error(own[name], expected.value) <= expected.limit:
                    groups.add(group)
        stages = zip(self._stages(), self.scores, strict=True)
        return sorted(groups | {group for (group, node), expected in stages if not self._selects_well(node, expected)})

    def _selects_well(self, node: ir.Node, expected: Expected) -> bool:
        """Whether a stage scores as it should, and keeps what those scores say."""
        own = self.cuts[0].nodes[str(node.name)]
        scores, kept = (str(value.name) for value in (own.inputs[0], own.outputs[0]) if value is not None)
        seen = self.own([scores, kept])
        if not relative_error(seen[scores], expected.value) <= expected.limit:
            return False
        return np.array_equal(seen[kept], self._kept_of(node, seen[scores]))

    def _kept_of(self, node: ir.Node, scores: np.ndarray) -> np.ndarray:
        """What the twin keeps by these scores: tokens that rounding flips at the cut are no fault of the choice."""
        scored, kept = node.inputs[0], str(node.outputs[0].name)
        assert scored is not None
        given = {str(scored.name): scores}
        return self.graphs[1].values(self.file, [kept], self.feed, self.kept_rows, given)[kept]

    def culprit(self, group: int) -> Culprit | None:
        """The first operator of a group whose output is bad while both graphs are given the twin's input of it."""
        try:
            found = list(self.operators(group))
        except CapaError as error:
            return self._stumble(str(error))
        for operator in found:
            if operator.output_error > self.limits.operator:
                # What an earlier layer leaves beside its output is first read here.
                earlier = (self._group_of(node) for node in operator.bad_inputs)
                elsewhere = (self.culprit(before) for before in earlier if before < group)
                return next((one for one in elsewhere if one is not None), operator)
        return None

    def operators(self, group: int) -> Iterator[Culprit]:
        """Every operator of a group, in order, with its errors.

        Raises:
            CapaError: ONNX Runtime cannot run it.
        """
        own, twin = self.cuts
        given: list[dict[str, np.ndarray]] = [{}, {}]
        if group > 1:
            names = [str(cut.bounds[group - 1].name) for cut in self.cuts]
            bound = self.twin(names[1:])[names[1]]
            given = [{name: bound} for name in names]
        pairs = own.pairs(twin, [0, 1] if group == 1 else [group])
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

    def _operator(self, pair: Pair, own: Mapping[str, np.ndarray], twin: Mapping[str, np.ndarray]) -> Culprit:
        inputs, outputs = (
            [(value, own[str(mine.name)], twin[str(value.name)]) for value, mine in values]
            for values in (pair.inputs, pair.outputs)
        )
        errors = [relative_error(mine, wanted) for _, mine, wanted in inputs]
        bad = [
            value.producer() for (value, *_), error in zip(inputs, errors, strict=True) if error > self.limits.operator
        ]
        return Culprit(
            pair.node,
            max(errors, default=0.0),
            max((relative_error(mine, wanted) for _, mine, wanted in outputs), default=0.0),
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
        """The first node of these groups that says something else than its twin, whatever comes of it."""
        for group in groups:
            for node in self.cuts[1].groups[group]:
                if difference := node_difference(node, *self.cuts):
                    return Culprit(node, 0.0, 0.0, difference)
        return None

    def beyond(self, limit: float) -> dict[ir.Node, float]:
        """The twin's nodes behind the embeddings whose outputs exceed a number, and their largest magnitudes."""
        twin, found = self.cuts[1], dict[ir.Node, float]()
        given: dict[str, np.ndarray] = {}
        # One layer at a time, so that no more than its values are held.
        for group in range(1, len(twin.groups)):
            made = {str(value.name): node for node in twin.groups[group] for value in node.outputs if _is_float(value)}
            bounds = [str(bound.name) for bound in twin.bounds[group : group + 1]]
            seen = self.graphs[1].values(self.file, [*made, *bounds], self.feed, self.kept_rows, given)
            for name, node in made.items():
                if (largest := _largest(seen[name])) > limit:
                    found[node] = max(found.get(node, 0.0), largest)
            given = {name: seen[name] for name in bounds}
        return found


def _largest(array: np.ndarray) -> float:
    """Of the magnitudes that are finite."""
    return float(np.abs(array[np.isfinite(array)]).max(initial=0.0))


def _is_float(value: ir.Value) -> bool:
    producer = value.producer()
    made = producer is not None and producer.op_type != "Constant"
    return made and value.dtype == ir.DataType.FLOAT and bool(value.uses())
