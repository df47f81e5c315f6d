"""Holds a bundle's artefacts against the eager model: export error, selection, and the method's own effect."""

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from capa_export.base.errors import first_line
from capa_export.base.progress import Report, silent, tracked
from capa_export.config.provider import Provider
from capa_export.config.recipe import Recipe
from capa_export.data.samples import Samples
from capa_export.export.graphs import DENSE, Graphs
from capa_export.graph.contract import LOGITS, kept_name
from capa_export.model.eager_plan import EagerInputs
from capa_export.model.lockstep import TOGETHER_BYTES, grouped
from capa_export.model.prompt import Prompt, Prompter
from capa_export.model.threads import worthwhile_threads
from capa_export.parity.export_error import ExportErrorMeter
from capa_export.parity.oracle import Oracle
from capa_export.parity.probe import ProbedModel
from capa_export.parity.records import Noise, Record, Records, forced_plan, tracing
from capa_export.parity.selection import SelectionMeter, comparable_kept
from capa_export.parity.trace import Trace
from capa_export.report.schema import PROMPTS, Check, ExportError, Selection
from capa_export.run.onnx import OnnxModel, Sessions
from capa_export.run.runtime import RuntimeModel

if TYPE_CHECKING:
    from capa_export.run.engine_model import EngineModel

__all__ = [
    "Comparison",
    "compare_dense",
    "compare_engine",
    "compare_onnx",
    "compare_prompts",
    "compare_sidecars",
    "dense_logits",
    "make_replay",
]

_REPLAYED = 8
"""Prompts whose hidden states are compared; beyond them, those whose kept sets flipped are replayed too."""

Replay = Callable[[Record, Sequence[np.ndarray]], Trace]
"""Runs the oracle on a record's prompt with other kept positions."""


@dataclass(frozen=True)
class Comparison:
    """The figures of one artefact against its references."""

    export_error: tuple[ExportError, ...]
    selection: tuple[Selection, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    milliseconds: Mapping[str, float] = field(default_factory=dict)
    """Median times of a prefill, without the vision tower, and of a decode step."""


def compare_onnx(
    graphs: Path | Graphs,
    precision: str,
    records: Records,
    recipe: Recipe,
    report: Report = silent,
    *,
    sliced: bool = False,
    provider: Provider = "cpu",
    sessions: Sessions | None = None,
) -> Comparison:
    """Compare ONNX files with eager CAPA in FP32, and in their own precision.

    The files run as they are. Where they keep other tokens than the oracle they are run again with the oracle's, so
    that flips and numeric drift are measured apart; so are the first few, to see their hidden states.

    Args:
        graphs: an `onnx` folder, or graphs that are not written.
        precision: precision of the graphs.
        records: the oracle's records of the prompts.
        recipe: the schedule, and the gates.
        report: told the progress.
        sliced: whether to hold no more than a layer's weights in memory.
        provider: of ONNX Runtime.
        sessions: those that `compare_dense` left open of the same graphs.
    """
    what = f"{precision} ONNX"
    meters = _meters(what, precision, records, recipe)
    selection = _selection_meter(what, precision, records, recipe)
    plain = OnnxModel(graphs, sliced=sliced, provider=provider, sessions=sessions)
    probed, clock = ProbedModel(graphs, sliced=sliced, provider=provider), _Clock()
    index = 0
    for group in _groups(plain, tracked(records, f"validate: {what}", len(records), report)):
        try:
            embeds = [plain.embed(record.prompt) for record in group]
            traces = _traces(plain, group, embeds, clock, [record.num_keep for record in group])
            flipped = [not _same_kept(trace, one.fp32) for trace, one in zip(traces, group, strict=True)]
            again = [at for at in range(len(group)) if flipped[at] or index + at < _REPLAYED]
            seen = probed.replays([group[at] for at in again], [embeds[at] for at in again]) if again else ()
            replayed = dict(zip(again, seen, strict=True))
        except Exception as error:  # ONNX Runtime's exceptions share no public base class.
            if not type(error).__module__.startswith("onnxruntime"):
                raise
            return _stopped(what, error, records)
        index += len(group)
        for at, (trace, record) in enumerate(zip(traces, group, strict=True)):
            states, chosen = replayed.get(at, (None, []))
            if states is not None:
                # The graph's kept sets where the same tokens entered; then those it would have kept of the oracle's.
                own = comparable_kept(trace, record.fp32)
                selection.add([*own, *chosen[len(own) :]], record, states)
            else:
                selection.add(trace.kept, record)
            # The gates of selection judge the graph as it runs; its numbers are compared with the same tokens kept.
            compared = states if flipped[at] and states is not None else trace
            for meter, reference in zip(meters, _references(record, precision), strict=True):
                meter.add(compared, reference, states, _noise_of(record, precision))
    return Comparison(
        tuple(one.result() for one in meters),
        (selection.result(),),
        warnings=selection.warnings(),
        milliseconds=clock.medians(),
    )


def compare_engine(
    engine: "EngineModel",
    folder: Path,
    precision: str,
    records: Records,
    recipe: Recipe,
    replay: Replay | None = None,
    report: Report = silent,
    *,
    sliced: bool = False,
) -> Comparison:
    """Compare engines with eager CAPA, and with the ONNX files they were built from, made to keep the same tokens.

    Args:
        engine: the bundle's engines, on the GPU.
        folder: the bundle's `onnx` folder.
        precision: precision of engines and files.
        records: the oracle's records of the prompts.
        recipe: the schedule, and the gates.
        replay: runs the oracle with the engines' kept positions; where None, prompts on which the engines keep other
            tokens are compared with the ONNX files alone.
        report: told the progress.
        sliced: whether to hold no more than a layer's weights of the ONNX files in memory.
    """
    what = f"{precision} engine"
    meters = _meters(what, precision, records, recipe)
    selection = _selection_meter(what, precision, records, recipe)
    gate = getattr(recipe.parity, precision)
    against_onnx = ExportErrorMeter(what, f"{precision} ONNX", gate, _noise(precision, records))
    for record in records:
        engine.check([record.prompt], [_num_keep(record, recipe)], records.steps)
    onnx, unseen, clock = ProbedModel(folder, sliced=sliced), 0, _Clock()
    for group in _groups(onnx, tracked(records, f"validate: {what}", len(records), report)):
        traces = [_trace(engine, record, clock) for record in group]
        embeds = [onnx.embed(record.prompt) for record in group]
        replayed = onnx.replays(group, embeds, [trace.kept for trace in traces])
        for record, trace, (as_onnx, _) in zip(group, traces, replayed, strict=True):
            selection.add(comparable_kept(trace, record.fp32), record)
            against_onnx.add(trace, as_onnx)
            if _same_kept(trace, record.fp32):
                for meter, reference in zip(meters, _references(record, precision), strict=False):
                    meter.add(trace, reference, noise=_noise_of(record, precision))
            elif replay is not None:
                meters[0].add(trace, replay(record, trace.kept))
            else:
                unseen += 1
    notes = [f"The engines ran on {engine.gpu.name}.", *selection.notes()]
    if unseen:
        notes.append(
            f"On {unseen} of {len(records)} prompts the engines kept other tokens than the oracle: there, they are "
            "held against the ONNX files alone."
        )
    compared = [one for one in (*meters, against_onnx) if one.prompts]
    return Comparison(
        tuple(one.result() for one in compared),
        (selection.result(),),
        tuple(notes),
        selection.warnings(),
        clock.medians(),
    )


def make_replay(oracle: Oracle) -> Replay:
    """Make a function that runs the eager model again with an artefact's kept positions."""

    def replay(record: Record, kept: Sequence[np.ndarray]) -> Trace:
        plan, eager = forced_plan(oracle, record.prompt, kept), oracle.eager
        return eager.run([tracing(oracle, eager, record.prompt, plan, len(record.fp32.logits), record.tokens)])[0][0]

    return replay


def compare_dense(
    oracle: Oracle, records: Records, recipe: Recipe, report: Report = silent, *, sessions: Sessions | None = None
) -> Comparison:
    """Compare the FP32 graphs, with nothing removed and no FFN scales, with the dense model's own forward pass.

    Args:
        oracle: the model, and the graphs.
        records: the oracle's records of the prompts.
        recipe: the schedule, and the gates.
        report: told the progress.
        sessions: gets those of the graphs that the pruned model shares: all but prefill's.
    """
    sessions = {} if sessions is None else sessions
    model, clock = OnnxModel(oracle.fp32_onnx, prefill=DENSE, sessions=sessions), _Clock()
    meter = ExportErrorMeter("fp32 ONNX, nothing removed", "dense eager fp32", recipe.parity.fp32)
    stages = len(recipe.prune.schedule)
    for group in _groups(model, tracked(records, "validate: dense", len(records), report)):
        embeds = [model.embed(record.prompt) for record in group]
        traces = _traces(model, group, embeds, clock, [[record.prompt.num_visual] * stages for record in group])
        for trace, record in zip(traces, group, strict=True):
            everything = [np.arange(len(record.prompt.input_ids))] * stages
            reference = Trace(dense_logits(oracle, record.prompt, record.tokens), everything)
            meter.add(trace, reference)
    sessions.pop(f"llm/{DENSE}", None)
    return Comparison((meter.result(),), milliseconds=clock.medians())


def compare_prompts(prompter: Prompter, bundled: Prompter, samples: Samples, changed: Sequence[str] = ()) -> Comparison:
    """Compare the prompts that the bundle's tokenizer, chat template and image processor make with the checkpoint's.

    Args:
        prompter: the checkpoint's prompter.
        bundled: the bundle's prompter.
        samples: the samples to make prompts of.
        changed: the bundle's files for other runtimes that differ from the checkpoint's.
    """
    different = 0
    for sample in samples:
        own, wanted = bundled.chat(sample.turns), prompter.chat(sample.turns)
        same = np.array_equal(own.input_ids, wanted.input_ids) and len(own.pictures) == len(wanted.pictures)
        different += not same or not all(
            np.array_equal(a.patches, b.patches) for a, b in zip(own.pictures, wanted.pictures, strict=True)
        )
    what = ", ".join([f"{different} of {samples.count} differ", *(f"{name} is another" for name in changed)])
    return _of_prompts("the checkpoint's processors", what, different + len(changed), samples.count)


def compare_sidecars(stored: Mapping[str, str], present: Mapping[str, str]) -> Comparison:
    """Compare the files that make prompts with those that made the golden samples, by SHA-256."""
    different = sorted(name for name in {*stored, *present} if stored.get(name) != present.get(name))
    return _of_prompts("the golden samples' processors", ", ".join(different), len(different), len(stored))


def _of_prompts(reference: str, what: str, different: int, count: int) -> Comparison:
    failure = f"{PROMPTS} against {reference}: {what}" if different else ""
    check = Check(name="differ", value=different, at_most=0, of=count, failure=failure)
    return Comparison(
        (ExportError(artefact=PROMPTS, reference=reference, prompts=count, steps=0, noise=0.0, checks=(check,)),)
    )


def _stopped(what: str, error: Exception, records: Records) -> Comparison:
    """The comparison of a graph that ONNX Runtime does not run to its end."""
    reference = "eager CAPA fp32"
    failure = f"{what} against {reference}: ONNX Runtime stops: {first_line(error)}"
    check = Check(name="runs", value=0, at_least=1, failure=failure)
    return Comparison(
        (ExportError(artefact=what, reference=reference, prompts=len(records), steps=0, noise=0.0, checks=(check,)),)
    )


def _meters(what: str, precision: str, records: Records, recipe: Recipe) -> list[ExportErrorMeter]:
    """Meters against the oracle, and against the eager model in the artefact's precision where that is not FP32."""
    names = ["fp32", *([precision] if precision != "fp32" else [])]
    gate, noise = getattr(recipe.parity, precision), _noise(precision, records)
    return [ExportErrorMeter(what, f"eager CAPA {name}", gate, noise) for name in names]


def _selection_meter(what: str, precision: str, records: Records, recipe: Recipe) -> SelectionMeter:
    return SelectionMeter(
        what,
        "eager CAPA fp32",
        recipe.prune.schedule,
        getattr(recipe.parity, precision),
        _noise(precision, records),
        recipe.prune.min_keep_per_image,
    )


def _noise(precision: str, records: Records) -> Noise:
    return records.noise if precision == records.precision else Noise(tie_iou=records.noise.tie_iou)


def _references(record: Record, precision: str) -> Iterator[Trace]:
    """The record's traces in the order of `_meters`."""
    yield record.fp32
    if precision != "fp32" and record.low_precision is not None:
        yield record.low_precision


def _noise_of(record: Record, precision: str) -> np.ndarray | None:
    """[S, V] change of the logits by the precision alone; None where there is none."""
    return (
        None
        if record.low_precision is None or precision == "fp32"
        else record.low_precision.logits - record.fp32.logits
    )


def _num_keep(record: Record, recipe: Recipe) -> list[int]:
    return recipe.prune.num_keep(record.prompt.image_lengths)


class _Clock:
    """Measures the times of prefills and decode steps."""

    def __init__(self) -> None:
        self._seconds: dict[str, list[float]] = {"prefill": [], "decode": []}

    @contextmanager
    def timing(self, what: str) -> Generator[None]:
        started = time.perf_counter()
        yield
        self._seconds[what].append(time.perf_counter() - started)

    def medians(self) -> dict[str, float]:
        """Median milliseconds by the name of what was timed."""
        return {what: median(seconds) * 1e3 for what, seconds in self._seconds.items() if seconds}


def _groups(model: OnnxModel, records: Iterable[Record]) -> Iterator[list[Record]]:
    """Group records whose prompts go through the graphs together; one by one where the graphs are in memory."""

    def size(record: Record) -> int:
        return model.prompt_bytes(len(record.prompt.input_ids) + len(record.tokens))

    return grouped(records, size, TOGETHER_BYTES if model.sliced else 0)


def _traces(
    model: OnnxModel,
    records: Sequence[Record],
    embeds: Sequence[Mapping[str, np.ndarray]],
    clock: _Clock,
    num_keep: Sequence[Sequence[int]],
) -> list[Trace]:
    """Run the graphs as they are on the records' prompts, of which `embeds` is what `embed` gives, and tokens."""
    prompts = [record.prompt for record in records]
    found = model.follow(prompts, num_keep, [record.tokens for record in records], embeds, timing=clock.timing)
    return [
        Trace(
            np.stack([outputs[LOGITS][0] for outputs in own]),
            [own[0][kept_name(stage)] for stage in range(len(num_keep[0]))],
        )
        for own in found
    ]


def _trace(model: RuntimeModel[Any], record: Record, clock: _Clock) -> Trace:
    """Run a runtime's graphs as they are on the record's prompt and tokens."""
    prompt, num_keep = record.prompt, record.num_keep
    embeds = model.embed(prompt)
    model.load(prompt)
    with clock.timing("prefill"):
        run = model.prefill(prompt, num_keep, embeds)
    logits, cache = [run.logits], model.batch([run.cache], len(record.fp32.logits))
    for step, token in enumerate(record.tokens):
        with clock.timing("decode"):
            output, cache = model.step(cache, token, prompt.next_position + step)
        logits.append(output)
    return Trace(np.stack(logits), run.kept)


def _same_kept(trace: Trace, other: Trace) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(trace.kept, other.kept, strict=True))


@torch.no_grad()
def dense_logits(oracle: Oracle, prompt: Prompt, tokens: Sequence[int]) -> np.ndarray:
    """Logits [S, V] of the Hugging Face decoder's own forward pass over a prompt and the S - 1 tokens behind it."""
    answer = torch.tensor([tokens], dtype=torch.long)
    with oracle.weights.holding_all(oracle.model), worthwhile_threads(oracle.model):
        text = oracle.model.model.language_model
        inputs = EagerInputs.of(oracle.family.eager_inputs(oracle.model, prompt))
        positions = inputs.next_position + torch.arange(answer.shape[1])
        whole = inputs._replace(
            embeds=torch.cat([inputs.embeds, text.embed_tokens(answer)], dim=1),
            position_ids=torch.cat(
                [inputs.position_ids, positions.expand(*inputs.position_ids.shape[:-1], -1)], dim=-1
            ),
        )
        is_visual = np.pad(prompt.is_visual, (0, answer.shape[1]))
        output = text(**whole.arguments(torch.from_numpy(is_visual)), use_cache=False)
        return oracle.model.lm_head(output.last_hidden_state[0, len(prompt.input_ids) - 1 :]).float().numpy()
