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

from capa_export.base.progress import Report, silent, tracked
from capa_export.config.recipe import Recipe
from capa_export.data.samples import Samples
from capa_export.export.stage import DENSE, Graphs
from capa_export.graph.contract import LOGITS, kept_name
from capa_export.model.eager import EagerInputs
from capa_export.model.lockstep import TOGETHER_BYTES, grouped
from capa_export.model.prompt import Prompt, Prompter
from capa_export.parity.comparison import Comparison
from capa_export.parity.oracle import Subject
from capa_export.parity.probe import ProbedModel
from capa_export.parity.records import Noise, Record, Records, forced_plan, tracing
from capa_export.parity.selection import Choice, agreeing
from capa_export.parity.trace import Trace
from capa_export.report.schema import PROMPTS, Check, ExportError, Selection
from capa_export.run.onnx import OnnxModel
from capa_export.run.runtime import Model

if TYPE_CHECKING:
    from capa_export.run.engine_model import EngineModel

__all__ = [
    "Compared",
    "compare_dense",
    "compare_engine",
    "compare_onnx",
    "compare_prompts",
    "compare_sidecars",
    "dense_logits",
    "replayed_oracle",
]

_REPLAYED = 8
"""Prompts whose hidden states are compared; beyond them, those whose kept sets flipped are replayed too."""

Expected = Callable[[Record, Sequence[np.ndarray]], Trace]
"""What the oracle makes of a record's prompt with other kept positions."""


@dataclass(frozen=True)
class Compared:
    """One artefact against its references."""

    export_error: tuple[ExportError, ...]
    selection: tuple[Selection, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    milliseconds: Mapping[str, float] = field(default_factory=dict)
    """Median of a prefill, vision apart, and of a decode step, over the prompts."""


def compare_onnx(
    graphs: Path | Graphs,
    precision: str,
    records: Records,
    recipe: Recipe,
    report: Report = silent,
    *,
    sliced: bool = False,
) -> Compared:
    """ONNX files against eager CAPA in FP32, and in their own precision.

    The files run as they are. Where they keep other tokens than the oracle they are run again with the oracle's, so
    that flips and numeric drift are measured apart; so are the first few, to see their hidden states.

    Args:
        graphs: an `onnx` folder, or graphs that are not written.
        precision: of its graphs.
        records: what the oracle made of the prompts.
        recipe: the schedule, and the gates.
        report: progress.
        sliced: whether no more than a layer's weights are to be in memory.
    """
    what = f"{precision} ONNX"
    comparisons = _comparisons(what, precision, records, recipe)
    choice = _choice(what, precision, records, recipe)
    plain, probed, clock = OnnxModel(graphs, sliced=sliced), ProbedModel(graphs, sliced=sliced), _Clock()
    index = 0
    for group in _groups(plain, tracked(records, f"validate: {what}", len(records), report)):
        try:
            traces = _traces(plain, group, clock, [record.num_keep for record in group])
            flipped = [not _same_kept(trace, one.oracle) for trace, one in zip(traces, group, strict=True)]
            again = [at for at in range(len(group)) if flipped[at] or index + at < _REPLAYED]
            replayed = dict(zip(again, probed.replays([group[at] for at in again]) if again else (), strict=True))
        except Exception as error:  # ONNX Runtime's exceptions share no public base class.
            if not type(error).__module__.startswith("onnxruntime"):
                raise
            return _stopped(what, error, records)
        index += len(group)
        for at, (trace, record) in enumerate(zip(traces, group, strict=True)):
            states, chosen = replayed.get(at, (None, []))
            if states is not None:
                # What the graph says it kept, where the same tokens entered; behind that, what it would have kept of
                # them.
                own = agreeing(trace, record.oracle)
                choice.add([*own, *chosen[len(own) :]], record, states)
            else:
                choice.add(trace.kept, record)
            # What the user gets is held to the selection's gates; what it computes is seen with the same tokens kept.
            compared = states if flipped[at] and states is not None else trace
            for comparison, reference in zip(comparisons, _references(record, precision), strict=True):
                comparison.add(compared, reference, states, _noise_of(record, precision))
    return Compared(
        tuple(one.result() for one in comparisons),
        (choice.result(),),
        warnings=choice.warnings(),
        milliseconds=clock.medians(),
    )


def compare_engine(
    engine: "EngineModel",
    folder: Path,
    precision: str,
    records: Records,
    recipe: Recipe,
    expected: Expected | None = None,
    report: Report = silent,
    *,
    sliced: bool = False,
) -> Compared:
    """Engines against eager CAPA, and against the ONNX files they were built from, made to keep the same tokens.

    Args:
        engine: the bundle's engines, on the GPU.
        folder: the bundle's `onnx` folder.
        precision: of both.
        records: what the oracle made of the prompts.
        recipe: the schedule, and the gates.
        expected: the oracle with kept positions that are not its own; where it is not given, prompts on which the
            engines keep others are held against the ONNX files alone.
        report: progress.
        sliced: whether no more than a layer's weights of the ONNX files are to be in memory.
    """
    what = f"{precision} engine"
    comparisons = _comparisons(what, precision, records, recipe)
    choice = _choice(what, precision, records, recipe)
    gate = getattr(recipe.parity, precision)
    against_onnx = Comparison(what, f"{precision} ONNX", gate, _noise(precision, records))
    for record in records:
        engine.check([record.prompt], [_num_keep(record, recipe)], records.steps)
    onnx, unseen, clock = ProbedModel(folder, sliced=sliced), 0, _Clock()
    for group in _groups(onnx, tracked(records, f"validate: {what}", len(records), report)):
        traces = [_trace(engine, record, clock) for record in group]
        replayed = onnx.replays(group, [trace.kept for trace in traces])
        for record, trace, (as_onnx, _) in zip(group, traces, replayed, strict=True):
            choice.add(agreeing(trace, record.oracle), record)
            against_onnx.add(trace, as_onnx)
            if _same_kept(trace, record.oracle):
                for comparison, reference in zip(comparisons, _references(record, precision), strict=False):
                    comparison.add(trace, reference, noise=_noise_of(record, precision))
            elif expected is not None:
                comparisons[0].add(trace, expected(record, trace.kept))
            else:
                unseen += 1
    notes = [f"The engines ran on {engine.gpu.name}.", *choice.notes()]
    if unseen:
        notes.append(
            f"On {unseen} of {len(records)} prompts the engines kept other tokens than the oracle: there, they are "
            "held against the ONNX files alone."
        )
    compared = [one for one in (*comparisons, against_onnx) if one.prompts]
    return Compared(
        tuple(one.result() for one in compared), (choice.result(),), tuple(notes), choice.warnings(), clock.medians()
    )


def replayed_oracle(subject: Subject) -> Expected:
    """The eager model, run again with the kept positions of an artefact."""

    def expected(record: Record, kept: Sequence[np.ndarray]) -> Trace:
        plan, eager = forced_plan(subject, record.prompt, kept), subject.eager
        return eager.run([tracing(subject, eager, record.prompt, plan, len(record.oracle.logits), record.tokens)])[0][0]

    return expected


def compare_dense(subject: Subject, records: Records, recipe: Recipe, report: Report = silent) -> Compared:
    """Nothing removed and no FFN scales, against the dense model's own forward pass."""
    model, clock = OnnxModel(subject.fp32_onnx, prefill=DENSE), _Clock()
    comparison = Comparison("fp32 ONNX, nothing removed", "dense eager fp32", recipe.parity.fp32)
    stages = len(recipe.prune.schedule)
    for group in _groups(model, tracked(records, "validate: dense", len(records), report)):
        traces = _traces(model, group, clock, [[record.prompt.num_visual] * stages for record in group])
        for trace, record in zip(traces, group, strict=True):
            everything = [np.arange(len(record.prompt.input_ids))] * stages
            reference = Trace(dense_logits(subject, record.prompt, record.tokens), everything)
            comparison.add(trace, reference)
    return Compared((comparison.result(),), milliseconds=clock.medians())


def compare_prompts(prompter: Prompter, bundled: Prompter, samples: Samples, changed: Sequence[str] = ()) -> Compared:
    """What the bundle's tokenizer, chat template and image processor make of the samples, against the checkpoint's.

    Args:
        prompter: of the checkpoint.
        bundled: of the bundle.
        samples: to make prompts of.
        changed: files that the bundle holds for other runtimes, and that are not the checkpoint's.
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


def compare_sidecars(stored: Mapping[str, str], present: Mapping[str, str]) -> Compared:
    """The files that make prompts, against those that made the golden samples, by SHA-256."""
    different = sorted(name for name in {*stored, *present} if stored.get(name) != present.get(name))
    return _of_prompts("the golden samples' processors", ", ".join(different), len(different), len(stored))


def _of_prompts(reference: str, what: str, different: int, count: int) -> Compared:
    failure = f"{PROMPTS} against {reference}: {what}" if different else ""
    check = Check(name="differ", value=different, at_most=0, of=count, failure=failure)
    return Compared(
        (ExportError(artefact=PROMPTS, reference=reference, prompts=count, steps=0, noise=0.0, checks=(check,)),)
    )


def _stopped(what: str, error: Exception, records: Records) -> Compared:
    """A graph that ONNX Runtime does not run to its end."""
    reference = "eager CAPA fp32"
    failure = f"{what} against {reference}: ONNX Runtime stops: {next(iter(str(error).splitlines()), '')[:300]}"
    check = Check(name="runs", value=0, at_least=1, failure=failure)
    return Compared(
        (ExportError(artefact=what, reference=reference, prompts=len(records), steps=0, noise=0.0, checks=(check,)),)
    )


def _comparisons(what: str, precision: str, records: Records, recipe: Recipe) -> list[Comparison]:
    """Against the oracle, and against the eager model in the artefact's own precision where that is another."""
    names = ["fp32", *([precision] if precision != "fp32" else [])]
    gate, noise = getattr(recipe.parity, precision), _noise(precision, records)
    return [Comparison(what, f"eager CAPA {name}", gate, noise) for name in names]


def _choice(what: str, precision: str, records: Records, recipe: Recipe) -> Choice:
    return Choice(
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
    """In the order of the comparisons."""
    yield record.oracle
    if precision != "fp32" and record.half is not None:
        yield record.half


def _noise_of(record: Record, precision: str) -> np.ndarray | None:
    """[S, V], what the precision alone does to the logits."""
    return None if record.half is None or precision == "fp32" else record.half.logits - record.oracle.logits


def _num_keep(record: Record, recipe: Recipe) -> list[int]:
    return recipe.prune.num_keep(record.prompt.image_lengths)


class _Clock:
    """Times of prefills and decode steps."""

    def __init__(self) -> None:
        self._seconds: dict[str, list[float]] = {"prefill": [], "decode": []}

    @contextmanager
    def timing(self, what: str) -> Generator[None]:
        started = time.perf_counter()
        yield
        self._seconds[what].append(time.perf_counter() - started)

    def medians(self) -> dict[str, float]:
        """In milliseconds, of what was timed."""
        return {what: median(seconds) * 1e3 for what, seconds in self._seconds.items() if seconds}


def _groups(model: OnnxModel, records: Iterable[Record]) -> Iterator[list[Record]]:
    """Records whose prompts go through the graphs together: one at a time where these are in memory."""

    def size(record: Record) -> int:
        return model.prompt_bytes(len(record.prompt.input_ids) + len(record.tokens))

    return grouped(records, size, TOGETHER_BYTES if model.sliced else 0)


def _traces(
    model: OnnxModel, records: Sequence[Record], clock: _Clock, num_keep: Sequence[Sequence[int]]
) -> list[Trace]:
    """The graphs as they are, fed the records' tokens."""
    prompts = [record.prompt for record in records]
    embeds = [model.embed(prompt) for prompt in prompts]
    found = model.follow(prompts, num_keep, [record.tokens for record in records], embeds, timing=clock.timing)
    return [
        Trace(
            np.stack([outputs[LOGITS][0] for outputs in own]),
            [own[0][kept_name(stage)] for stage in range(len(num_keep[0]))],
        )
        for own in found
    ]


def _trace(model: Model[Any], record: Record, clock: _Clock) -> Trace:
    """A runtime's graphs as they are, fed the record's tokens."""
    prompt, num_keep = record.prompt, record.num_keep
    embeds = model.embed(prompt)
    model.load(prompt)
    with clock.timing("prefill"):
        run = model.prefill(prompt, num_keep, embeds)
    logits, cache = [run.logits], model.batch([run.cache], len(record.oracle.logits))
    for step, token in enumerate(record.tokens):
        with clock.timing("decode"):
            output, cache = model.step(cache, token, prompt.next_position + step)
        logits.append(output)
    return Trace(np.stack(logits), run.kept)


def _same_kept(trace: Trace, other: Trace) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(trace.kept, other.kept, strict=True))


@torch.no_grad()
def dense_logits(subject: Subject, prompt: Prompt, tokens: Sequence[int]) -> np.ndarray:
    """[S, V] of the Hugging Face decoder's own forward pass over a prompt and the S - 1 tokens behind it."""
    answer = torch.tensor([tokens], dtype=torch.long)
    with subject.weights.holding_all(subject.model):
        text = subject.model.model.language_model
        inputs = EagerInputs.of(subject.family.eager_inputs(subject.model, prompt))
        positions = inputs.next_position + torch.arange(answer.shape[1])
        whole = inputs._replace(
            embeds=torch.cat([inputs.embeds, text.embed_tokens(answer)], dim=1),
            position_ids=torch.cat(
                [inputs.position_ids, positions.expand(*inputs.position_ids.shape[:-1], -1)], dim=-1
            ),
        )
        is_visual = np.pad(prompt.is_visual, (0, answer.shape[1]))
        output = text(**whole.arguments(torch.from_numpy(is_visual)), use_cache=False)
        return subject.model.lm_head(output.last_hidden_state[0, len(prompt.input_ids) - 1 :]).float().numpy()
