"""Looks inside a bundle's graphs as ONNX Runtime runs them: intermediate values, and kept positions that are given."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir

from capa_export.config.provider import Provider
from capa_export.export.graphs import Graphs
from capa_export.graph.contract import INPUTS_EMBEDS, LOGITS
from capa_export.parity.records import Record
from capa_export.parity.trace import HiddenStates, Trace, rows_of_positions
from capa_export.run.onnx import OnnxModel

__all__ = ["ProbedModel", "force_kept", "layer_outputs", "tap"]

_FORCED = "forced_rows"
_NORM = "{}/input_layernorm/RMSNormalization"
_LAST_NORM = "model/norm/RMSNormalization"


def tap(model: ir.Model, names: Sequence[str]) -> None:
    """Make values of these names outputs of the graph; those that are outputs already stay."""
    outputs = {value.name for value in model.graph.outputs}
    values = {value.name: value for node in model.graph for value in node.outputs}
    model.graph.outputs.extend(values[name] for name in dict.fromkeys(names) if name not in outputs)


def layer_outputs(model: ir.Model) -> list[str]:
    """Names of the hidden states that leave each decoder layer, prefill's [T_l, D] or decode's [B * S, D]."""
    nodes = {node.name: node for node in model.graph}
    entering: list[ir.Value] = []
    while (norm := nodes.get(_NORM.format(f"model/layers.{len(entering)}"))) is not None:
        entering.append(_input(norm))
    last = _input(nodes[_LAST_NORM])
    while (node := last.producer()) is not None and node.op_type in {"Slice", "Reshape"}:
        last = _input(node)
    return [str(value.name) for value in (*entering[1:], last)]


def _input(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value


def force_kept(model: ir.Model) -> list[str]:
    """Make the rows that each stage of prefill keeps an input, `forced_rows.<stage>` [K] int64.

    Returns:
        Names of the values that hold the rows each stage would have kept by itself; they are outputs now.
    """
    chosen: list[str] = []
    for stage, node in enumerate([node for node in model.graph if node.op_type == "TopKKeep"]):
        own = node.outputs[0]
        given = ir.val(f"{_FORCED}.{stage}", ir.DataType.INT64, [f"forced_{stage}"])
        model.graph.inputs.append(given)
        for user, index in tuple(own.uses()):
            user.replace_input_with(index, given)
        chosen.append(str(own.name))
    tap(model, chosen)
    return chosen


class ProbedModel(OnnxModel):
    """Runs the graphs of an `onnx/` folder on given kept positions, with the layers' outputs seen."""

    def __init__(
        self, graphs: Path | Graphs, *, threads: int = 0, sliced: bool = False, provider: Provider = "cpu"
    ) -> None:
        super().__init__(graphs, threads=threads, sliced=sliced, provider=provider)
        self._layers: dict[str, list[str]] = {}
        self._chosen: list[str] = []
        self._scores: list[str] = []

    def _changes(self, file: str) -> Sequence[Callable[[ir.Model], None]]:
        return [partial(self._open_up, file)] if file.startswith("llm/") else []

    def _open_up(self, file: str, model: ir.Model) -> None:
        self._layers[file] = layer_outputs(model)
        tap(model, self._layers[file])
        if file.endswith(self.prefill_file):
            self._chosen = force_kept(model)
            self._scores = [str(_input(node).name) for node in model.graph if node.op_type == "TopKKeep"]
            tap(model, self._scores)

    def replays(
        self,
        records: Sequence[Record],
        embeds: Sequence[Mapping[str, np.ndarray]],
        kept: Sequence[Sequence[np.ndarray]] | None = None,
    ) -> list[tuple[Trace, list[np.ndarray]]]:
        """Run the prompts of records, fed their tokens.

        Args:
            records: the prompts and their tokens.
            embeds: what `embed` gives for each prompt, here or where the same graphs are run as they are.
            kept: prompt positions that each prompt keeps after each stage; by default the oracle's.

        Returns:
            The traces, and the prompt positions that each stage would have kept of the tokens that entered it.
        """
        kept = [record.fp32.kept for record in records] if kept is None else kept
        found = self.follow(
            [record.prompt for record in records],
            [record.prompt.num_keep(own) for record, own in zip(records, kept, strict=True)],
            [record.tokens for record in records],
            embeds,
            [{f"{_FORCED}.{stage}": rows for stage, rows in enumerate(rows_of_positions(own))} for own in kept],
        )
        return [self._replayed(*one) for one in zip(records, kept, embeds, found, strict=True)]

    def _replayed(
        self,
        record: Record,
        kept: Sequence[np.ndarray],
        embeds: Mapping[str, np.ndarray],
        found: Sequence[Mapping[str, np.ndarray]],
    ) -> tuple[Trace, list[np.ndarray]]:
        """The trace of one record, from the outputs of its prefill and of each step."""
        prompt, (filled, *steps) = record.prompt, found
        entering = [np.arange(len(prompt.input_ids)), *kept]
        chosen = [before[filled[name]] for before, name in zip(entering, self._chosen, strict=False)]
        positions = {len(own): own for own in entering}
        prefill, decode = (self._layers[f"llm/{file}"] for file in (self.prefill_file, "decode.onnx"))
        states = HiddenStates(record.rows, len(prefill))
        for name in prefill:
            states.add_prefill(filled[name], positions[len(filled[name])])
        for step in steps:
            for layer, name in enumerate(decode):
                states.add_step(layer, step[name][0])
        features = embeds[INPUTS_EMBEDS][0, prompt.is_visual].astype(np.float32) if prompt.pictures else None
        logits = np.stack([outputs[LOGITS][0] for outputs in found])
        return Trace(logits, [*kept], [filled[name] for name in self._scores], states.stacked(), features), chosen
