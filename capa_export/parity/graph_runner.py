"""Runs a bundle's graphs with any value to be seen or given."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from capa_export.base.errors import CapaError, first_line
from capa_export.export.graphs import Graphs
from capa_export.parity.probe import force_kept
from capa_export.run.onnx import NUMPY_TYPES, OnnxModel

__all__ = ["GraphRunner"]


class GraphRunner(OnnxModel):
    """Runs the graphs of an `onnx/` folder with any value seen or given; in prefill, kept rows are given."""

    def __init__(self, graphs: Path | Graphs, *, sliced: bool = False) -> None:
        super().__init__(graphs, sliced=sliced)
        self._key: Any = None
        self._rows: list[str] = []
        self._graphs: dict[str, ir.Model] = {}

    def _graph(self, file: str) -> ir.Model:
        # It is asked for at every look, and copying takes less than reading.
        if file not in self._graphs:
            self._graphs[file] = super()._graph(file)
        return self._graphs[file].clone()

    def graph(self, file: str) -> ir.Model:
        """The graph that is run: in prefill, kept rows are inputs."""
        model = self._graph(file)
        force_kept(model)
        return model

    def values(
        self,
        file: str,
        names: Iterable[str],
        feed: Mapping[str, np.ndarray],
        kept_rows: Sequence[np.ndarray] = (),
        given: Mapping[str, np.ndarray] = MappingProxyType({}),
    ) -> dict[str, np.ndarray]:
        """Compute values by name; only the nodes that they need are run.

        Args:
            file: the graph's file in the folder.
            names: names of the values.
            feed: the graph's inputs, floats in any precision.
            kept_rows: rows that each stage keeps, of those that enter it.
            given: arrays to feed to the readers of some values in their place.

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
            raise CapaError(f"{self.folder / file}: ONNX Runtime cannot run it: {first_line(error)}") from error

    def _changes(self, file: str) -> Sequence[Any]:  # noqa: ARG002 - `values` has opened it.
        return [partial(self._narrow, *self._key[1:])]

    def _narrow(self, names: Sequence[str], given: Sequence[str], model: ir.Model) -> None:
        graph = model.graph
        num_inputs = len(graph.inputs)
        force_kept(model)
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
