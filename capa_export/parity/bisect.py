"""Finds where an artefact leaves the oracle: the graph, then the layer in log steps, then the operator."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from capa_export.base.errors import CapaError
from capa_export.base.precision import FP16_MAX
from capa_export.base.progress import Report, silent, tracked
from capa_export.config.parts import block_of, layer_of
from capa_export.export.graphs import Graphs
from capa_export.export.in_place import EMBEDDING_FILE, embedding_of
from capa_export.graph.contract import (
    DEEPSTACK_EMBEDS,
    DEEPSTACK_FEATURES,
    IMAGE_FEATURES,
    INPUTS_EMBEDS,
    LOGITS,
    NUM_KEEP,
    PAST_LENGTHS,
    PIXEL_VALUES,
    POSITION_IDS,
    TEXT_POSITIONS,
    past_of,
)
from capa_export.model.prompt import Picture
from capa_export.parity.graph_groups import GraphGroups
from capa_export.parity.graph_runner import GraphRunner
from capa_export.parity.layerwise import (
    Culprit,
    ErrorLimits,
    ExpectedValue,
    Run,
    worst_row_error,
)
from capa_export.parity.records import Record, Records
from capa_export.parity.trace import HiddenStates, Trace, rows_of_positions
from capa_export.passes.fp32_parts import unit_of
from capa_export.report.schema import Bisection, Probe

__all__ = ["bisect"]

_VISUAL, _PREFILL, _DECODE = "visual/model.onnx", "llm/prefill.onnx", "llm/decode.onnx"
_EMBEDDING = f"llm/{EMBEDDING_FILE}"
_LARGEST = {"fp16": FP16_MAX}
_AGAIN = "the file was changed: run `capa-export export` again"


def bisect(
    artefact: Path | Graphs,
    precision: str,
    reference: Path | Graphs,
    records: Records,
    report: Report = silent,
    *,
    sliced: bool = False,
) -> Bisection:
    """Say where an artefact leaves the eager model, on the first prompt on which it does.

    Args:
        artefact: an `onnx` folder, or graphs that are not written.
        precision: precision of the artefact's graphs.
        reference: the same graphs written anew in FP32 from the checkpoint, with the same node names.
        records: the eager model's results on some prompts.
        report: told the progress.
        sliced: whether to hold no more than a layer's weights in memory.

    Raises:
        CapaError: a graph or its embeddings cannot be loaded.
    """
    search = _Search(artefact, precision, reference, sliced=sliced)
    for record in tracked(records, "bisect", len(records), report):
        if (found := search.embedding(record)) is not None:
            return found
        for run in search.runs(record):
            if (found := search.within(run) or search.overflow(run, record)) is not None:
                return found
    return search.found(
        "", f"no graph of the {precision} ONNX leaves the eager model by more than its precision explains"
    )


class _Search:
    """The search for a fault in one artefact, and the probes it took."""

    def __init__(self, artefact: Path | Graphs, precision: str, reference: Path | Graphs, *, sliced: bool) -> None:
        self.precision, self.limits = precision, ErrorLimits.of(precision)
        self.graphs = GraphRunner(artefact, sliced=sliced), GraphRunner(reference, sliced=sliced)
        self.tables = _table(artefact), _table(reference)
        self.probes: list[Probe] = []
        self._cuts: dict[str, tuple[GraphGroups, GraphGroups]] = {}

    def found(self, file: str, what: str, node: ir.Node | None = None, layer: str = "", **more: Any) -> Bisection:
        """A bisection that ends here, with its finding in one sentence."""
        name = "" if node is None else str(node.name)
        return Bisection(
            artefact=f"{self.precision} ONNX",
            graph=file,
            layer=layer,
            block=block_of(name) if name else "",
            node=name,
            sentence=f"{what}.",
            probes=tuple(self.probes),
            **more,
        )

    def _probe(self, name: str, error: float, limit: float) -> bool:
        """Record an error and its limit, and return whether it is within it."""
        clean = bool(error <= limit)
        self.probes.append(Probe(name=name, relative_error=error, limit=limit, clean=clean))
        return clean

    # Runs of the graphs, and their expected values.

    def embedding(self, record: Record) -> Bisection | None:
        """Find tokens whose embeddings are not the checkpoint's."""
        rows = np.unique([*record.prompt.input_ids[~record.prompt.is_visual], *record.tokens])
        own, reference = (np.asarray(table[rows]) for table in self.tables)
        wrong = int((own != reference.astype(own.dtype)).any(axis=-1).sum())
        if not wrong:
            return None
        self._probe(_EMBEDDING, worst_row_error(own, reference), 0.0)
        return self.found(
            _EMBEDDING,
            f"{_EMBEDDING}: the embeddings of {wrong} of {len(rows)} tokens are not the checkpoint's; {_AGAIN}",
        )

    def runs(self, record: Record) -> Iterator[Run]:
        """Run each graph on the eager model's inputs of it, so that one fault does not hide another."""
        prompt, fp32 = record.prompt, record.fp32
        # In FP32 there is no noise: the oracle beside itself.
        traces = fp32, fp32 if self.precision == "fp32" or record.low_precision is None else record.low_precision
        ends = np.cumsum([picture.num_tokens for picture in prompt.pictures])
        for picture, end in zip(prompt.pictures, ends, strict=True):
            rows = slice(end - picture.num_tokens, end)
            features = self._expected(*(_seen(trace.features)[rows] for trace in traces))
            yield self._run(_VISUAL, _pixels(picture), {IMAGE_FEATURES: features}, limit=features.limit)
        entering = [np.arange(len(prompt.input_ids)), *fp32.kept]
        positions = {len(rows): rows for rows in entering}
        visual = [prompt.is_visual[rows] for rows in entering]
        scores = [
            self._expected(*(np.where(visual[stage], trace.scores[stage], np.inf) for trace in traces))
            for stage in range(len(fp32.scores))
        ]
        num_rows = len(record.rows)
        prefill = self._run(
            _PREFILL,
            self._prompt_feed(record),
            self._logits(traces, 0),
            bounds=self._hidden(traces, slice(0, num_rows)),
            rows=partial(_sampled, positions=positions, rows=record.rows),
            kept_rows=rows_of_positions(fp32.kept),
            scores=scores,
        )
        yield prefill
        past = past_of(prefill.reference(prefill.cuts[1].outputs))
        lengths = np.array([[len(rows)] for rows in entering], np.int64)
        for step, token in enumerate(record.tokens):
            feed = {
                INPUTS_EMBEDS: self.tables[1][[[token]]],
                POSITION_IDS: np.full((len(prompt.position_ids), 1, 1), prompt.next_position + step),
                PAST_LENGTHS: lengths + step,
                **past,
            }
            hidden = self._hidden(traces, slice(num_rows + step, num_rows + step + 1))
            decode = self._run(_DECODE, feed, self._logits(traces, step + 1), bounds=hidden)
            yield decode
            past = past_of(decode.reference(decode.cuts[1].outputs))

    def _run(self, file: str, feed: Mapping[str, np.ndarray], outputs: Mapping[str, ExpectedValue], **more: Any) -> Run:
        if file not in self._cuts:
            reference = GraphGroups(self.graphs[1].graph(file))
            self._cuts[file] = GraphGroups(self.graphs[0].graph(file), reference), reference
        return Run(file, self.graphs, self._cuts[file], feed, self.limits, outputs, **more)

    def _prompt_feed(self, record: Record) -> dict[str, np.ndarray]:
        prompt = record.prompt
        embeds = self.tables[1][prompt.input_ids].astype(np.float32)
        feed = {
            INPUTS_EMBEDS: embeds[None],
            POSITION_IDS: prompt.position_ids,
            TEXT_POSITIONS: prompt.text_positions,
            NUM_KEEP: np.array(record.num_keep, np.int64),
        }
        if not prompt.pictures:
            return feed
        embeds[prompt.is_visual] = _seen(record.fp32.features)
        inputs = {value.name: value for value in self.graphs[1].graph(_PREFILL).graph.inputs}
        if DEEPSTACK_EMBEDS in inputs:
            seen = [
                self.graphs[1].values(_VISUAL, [DEEPSTACK_FEATURES], _pixels(picture))[DEEPSTACK_FEATURES]
                for picture in prompt.pictures
            ]
            deepstack_LND = np.concatenate(seen, axis=1)
            feed[DEEPSTACK_EMBEDS] = np.zeros((len(deepstack_LND), *embeds.shape), np.float32)
            feed[DEEPSTACK_EMBEDS][:, prompt.is_visual] = deepstack_LND
        return feed

    def _expected(self, wanted: np.ndarray, rounded: np.ndarray) -> ExpectedValue:
        """A part of the oracle's trace, with a limit from the eager model's own error in this precision."""
        return ExpectedValue(wanted, self.limits.over(worst_row_error(rounded, wanted)))

    def _logits(self, traces: Sequence[Trace], step: int) -> dict[str, ExpectedValue]:
        return {LOGITS: self._expected(*(trace.logits[step : step + 1] for trace in traces))}

    def _hidden(self, traces: Sequence[Trace], rows: slice) -> dict[int, ExpectedValue]:
        """Bound -> the hidden states that should leave the layer before it."""
        hidden = [_seen(trace.hidden)[:, rows] for trace in traces]
        return {layer + 1: self._expected(*of_layer) for layer, of_layer in enumerate(zip(*hidden, strict=True))}

    # The search within a graph.

    def within(self, run: Run) -> Bisection | None:
        """Find the fault in one graph on one input; None where there is none."""
        if missing := run.cuts[0].missing:
            what = f"{run.file} has no {missing}, which it has when written anew; {_AGAIN}"
            return self.found(run.file, what, run.cuts[1].nodes.get(missing), layer_of(missing))
        try:
            run.first_look()
            bad = run.bad_groups()
        except CapaError:
            # It does not run to its end; how far it does will be seen.
            bad = [len(run.layers) + 1]
        last = len(run.layers)
        wrong = not self._look(run, last)
        if not wrong and not bad:
            return None
        if wrong:
            bad = sorted({*bad, self._first_layer(run, last)})
        for group in bad:
            if (culprit := run.culprit(group)) is not None:
                return self._blame(run, culprit, group)
        if (culprit := run.changed(range(bad[0] + 1))) is not None:
            return self._blame(run, culprit, bad[0])
        return self._no_culprit(run, bad[0])

    def _look(self, run: Run, bound: int) -> bool:
        error, limit = run.bound_error(bound)
        return self._probe(run.layers[bound - 1] if bound else run.file, error, limit)

    def _first_layer(self, run: Run, wrong: int) -> int:
        """The group before the first bad bound, in log steps, since an error stays in the residual stream."""
        # Embeddings are given; the tower makes its own.
        clean = 0 if run.bounds else -1
        while wrong - clean > 1:
            middle = (clean + wrong) // 2
            if self._look(run, middle):
                clean = middle
            else:
                wrong = middle
        return wrong

    def _blame(self, run: Run, culprit: Culprit, group: int) -> Bisection:
        """Blame one operator: for what it computes, or for its precision."""
        node = culprit.node
        self._probe(str(node.name), culprit.output_error, self.limits.operator)
        layer = layer_of(str(node.name))
        where = f"{run.file} leaves the eager model at {_place(str(node.name), layer)}"
        if culprit.difference:
            what = f"{_symptom(culprit, self.limits)}; {culprit.difference}"
            if not culprit.output_error:
                what = f"{culprit.difference}, which shows at {self._group(run, group)}"
            return self.found(run.file, f"{where}: {what}; {_AGAIN}", node, layer)
        if self.precision == "fp32":
            what = "ONNX Runtime computes it otherwise than in the same graph written anew; please report it"
            return self.found(run.file, f"{where}: {what}", node, layer)
        return self._too_narrow(run, culprit, where)

    def _too_narrow(self, run: Run, culprit: Culprit, where: str) -> Bisection:
        limit = _LARGEST.get(self.precision, np.inf)
        if not culprit.finite and culprit.largest > limit:
            why = f"it overflows {self.precision.upper()}: {culprit.largest:.2g} > {limit:g}"
            return self._in_fp32(run, culprit.node, run.beyond(limit), f"{where}: {why}")
        why = f"it is off by {culprit.output_error:.2g} in {self.precision.upper()} and good in FP32"
        return self._in_fp32(run, culprit.node, [culprit.node], f"{where}: {why}")

    def _in_fp32(self, run: Run, node: ir.Node, nodes: Iterable[ir.Node], why: str) -> Bisection:
        """Blame a node, with the parts to compute in FP32 as a remedy: those that `nodes` are in."""
        layer = layer_of(str(node.name))
        units = tuple(dict.fromkeys(str(unit) for one in nodes if (unit := unit_of(one))))
        if not units:
            return self.found(run.file, f"{why}; use --precision fp32", node, layer)
        remedy = f"compute it in FP32: --fp32-layers {','.join(units)}"
        return self.found(run.file, f"{why}; {remedy}", node, layer, fp32_layers=units)

    def overflow(self, run: Run, record: Record) -> Bisection | None:
        """Find values beyond the precision's range where the eager model overflows, though ONNX Runtime used FP32."""
        low_precision, limit = record.low_precision, _LARGEST.get(self.precision)
        if low_precision is None or limit is None or _is_finite(low_precision, record.fp32):
            return None
        found = run.beyond(limit)
        if not found:
            return None
        node, largest = next(iter(found.items()))
        self.probes.append(Probe(name=str(node.name), relative_error=np.inf, limit=self.limits.operator, clean=False))
        place = _place(str(node.name), layer_of(str(node.name)))
        why = (
            f"{run.file} reaches {largest:.2g} > {limit:g} at {place}, where the eager model overflows "
            f"{self.precision.upper()} and ONNX Runtime's CPU provider computes in FP32"
        )
        return self._in_fp32(run, node, found, why)

    def _no_culprit(self, run: Run, group: int) -> Bisection:
        """Blame the graph as a whole, or the worst operator where small errors add up."""
        if run.reference_is_off(group):
            import transformers

            what = (
                f"{run.file} leaves the eager model at {self._group(run, group)}, and so does the same graph written "
                "anew from the checkpoint: the graph itself is not this model's; please report it, with transformers "
                f"{transformers.__version__}"
            )
            return self.found(run.file, what, layer=self._layer(run, group))
        worst = max(run.operators(group), key=lambda operator: operator.output_error)
        name = str(worst.node.name)
        where = f"{run.file} leaves the eager model at {_place(name, layer_of(name))}"
        return self._too_narrow(run, worst, where)

    @staticmethod
    def _layer(run: Run, group: int) -> str:
        return run.layers[group - 1] if 0 < group <= len(run.layers) else ""

    def _group(self, run: Run, group: int) -> str:
        return self._layer(run, group) or ("its embeddings" if group == 0 else "what follows its layers")


def _symptom(culprit: Culprit, limits: ErrorLimits) -> str:
    off = f"its output is off by {culprit.output_error:.2g}"
    if not culprit.finite:
        off = "its output is not finite"
    elif np.isinf(culprit.output_error):
        off = "its output is another"
    good = culprit.input_error <= limits.operator
    return f"its inputs are good to {culprit.input_error:.1g}, {off}" if good else off


def _place(node: str, layer: str) -> str:
    """A node's place for people, as `layers.3.self_attn (o_proj/Gemm)`."""
    block = block_of(node)
    if not layer and not block:
        return node
    path = node.split("/")
    inner = path[path.index(block) + 1 :] if block in path else path[-1:]
    return f"{'.'.join(part for part in (layer, block) if part)} ({'/'.join(inner)})"


def _table(graphs: Path | Graphs) -> np.ndarray:
    """The token embeddings, [V, D]."""
    tensor = graphs.embedding if isinstance(graphs, Graphs) else embedding_of(graphs / "llm")
    return tensor.mapped()


def _seen(array: np.ndarray | None) -> np.ndarray:
    assert array is not None
    return array


def _is_finite(low_precision: Trace, fp32: Trace) -> bool:
    pairs = (low_precision.logits, fp32.logits), (_seen(low_precision.hidden), _seen(fp32.hidden))
    return all(np.isfinite(worst_row_error(rounded, wanted)) for rounded, wanted in pairs)


def _pixels(picture: Picture) -> dict[str, np.ndarray]:
    return {PIXEL_VALUES: picture.patches}


def _sampled(hidden_TD: np.ndarray, positions: Mapping[int, np.ndarray], rows: np.ndarray) -> np.ndarray:
    """Hidden states [R, D] at sampled prompt positions, NaN where dropped; unchanged where no stage has T tokens."""
    if len(hidden_TD) not in positions:
        return hidden_TD
    states = HiddenStates(rows, 1)
    states.add_prefill(hidden_TD, positions[len(hidden_TD)])
    return states.stacked()[0]
