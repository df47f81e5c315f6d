"""Records of the oracle's results on prompts: on disk, one prompt a file, so that samples cost no memory.

The first few are the golden samples of a bundle, against which it is validated where there is no checkpoint.

S = steps, V = vocabulary, L = decoder layers, R = sampled prompt positions, D = hidden size.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from capa_export.base.errors import CapaError, ExitCode
from capa_export.base.progress import Report, silent, tracked
from capa_export.data.samples import Sample, Samples
from capa_export.model.eager import Eager, best_rows
from capa_export.model.eager_plan import EagerPlan, inputs_for
from capa_export.model.lockstep import Pass
from capa_export.model.low_precision import HALF, lowered
from capa_export.model.prompt import Picture, Prompt
from capa_export.parity.distance import Distance, VectorDistance, worse
from capa_export.parity.oracle import Oracle
from capa_export.parity.trace import HiddenStates, Trace, overlap, sampled_rows
from capa_export.selectors.selector import load_selector

__all__ = [
    "Noise",
    "Record",
    "Records",
    "forced_plan",
    "score_errors",
    "tracing",
    "write_records",
]

_ABOUT = "records.json"
_VERSION = 4
_LAST_BITS = 1e-6
"""Relative change of some ten units in the last place of FP32, by which sums in another order differ."""


@dataclass(frozen=True)
class Noise:
    """Errors of a precision alone, in the eager model with kept sets forced; worst over the prompts, 0 for FP32.

    No exported graph takes part: a wrong graph cannot excuse itself.
    """

    logits: float = 0.0
    """Largest difference of a logit; not finite where the eager model overflows, as all below."""
    hidden: tuple[float, ...] = ()
    """Relative error of the hidden states that leave each layer."""
    features: float = 0.0
    """Relative error of the vision tower's output."""
    kl: float = 0.0
    """Largest KL(FP32 || this precision) of the next token in nats, or what changes as large would be expected to do
    at the step where they matter most: which step they fall on is chance."""
    relative_error: float = 0.0
    """Largest |logit difference| over the largest |logit|."""
    cosine: float = 1.0
    """Smallest cosine of the logits."""
    norm_ratio: float = 0.0
    """Largest |difference of the logits| / |FP32's|, which is how far it can move their norm: how much of it does is
    chance."""
    hidden_cosine: tuple[float, ...] = ()
    """The same of a token's hidden state that leaves each layer."""
    hidden_norm_ratio: tuple[float, ...] = ()
    hidden_difference: tuple[float, ...] = ()
    """Median length of the difference of a token's hidden state that leaves each layer."""
    features_cosine: float = 1.0
    """The same of the vision tower's output."""
    features_norm_ratio: float = 0.0
    scores: tuple[float, ...] = ()
    """Per stage, the largest relative change of a visual token's score that is at least half of the cut."""
    iou: tuple[tuple[float, ...], ...] = ()
    """Per stage and prompt, the IoU of tokens kept in this precision and in FP32, of the same tokens that entered."""
    tie_iou: tuple[tuple[float, ...], ...] = ()
    """Per stage and prompt, the IoU of tokens kept in FP32 and after the last bits of the selector's inputs change."""


@dataclass(frozen=True)
class Record:
    """One prompt, and the eager model's traces of it with CAPA."""

    prompt: Prompt
    tokens: list[int]
    """[S - 1] tokens fed after the prompt: the known answer, then the eager model's own."""
    rows: np.ndarray
    """[R] prompt positions whose hidden states were seen."""
    fp32: Trace
    """The oracle's trace, in FP32."""
    low_precision: Trace | None
    """The trace in the bundle's precision, with the oracle's kept sets; None where that is FP32."""

    @property
    def num_keep(self) -> list[int]:
        """Visual tokens that the oracle keeps after each stage."""
        return self.prompt.num_keep(self.fp32.kept)


@torch.no_grad()
def tracing(
    oracle: Oracle,
    eager: Eager,
    prompt: Prompt,
    plan: EagerPlan,
    steps: int,
    tokens: Sequence[int] = (),
    rows: np.ndarray | None = None,
) -> Pass[tuple[Trace, list[int]]]:
    """A pass of a prompt and its answer, which ends in the trace and the S - 1 tokens that were fed.

    Known tokens follow the prompt through the layers; each one after them takes a pass of its own.

    Args:
        oracle: gives the family.
        eager: the eager model in any precision.
        prompt: the prompt to run.
        plan: the pruning.
        steps: S.
        tokens: tokens to feed first; greedy ones follow.
        rows: prompt positions whose hidden states the trace holds, with the vision tower's output; None for neither.
    """
    yield "tower"
    inputs = inputs_for(plan, oracle.family, eager.model, prompt)
    is_visual = torch.from_numpy(prompt.is_visual)
    states = None if rows is None else HiddenStates(rows, len(eager.text.layers))

    def watch(layer: int, hidden_XD: torch.Tensor, positions_T: torch.Tensor) -> None:
        if states is None:
            return
        if len(positions_T):
            states.add_prefill(hidden_XD.float().numpy(), positions_T.numpy())
        else:
            states.add_step(layer, hidden_XD[0].float().numpy())

    fed = list(tokens[: steps - 1])
    run, known = yield from eager.following(inputs, is_visual, plan, fed, watch)
    logits = [of_step.numpy() for of_step in known]
    while len(logits) < steps:
        fed.append(int(logits[-1].argmax()))
        position_ids = torch.full(run.position_shape, run.next_position + len(fed) - 1)
        logits.append((yield from eager.stepping(run.cache, fed[-1], position_ids, watch)).numpy())
    trace = Trace(
        np.stack(logits),
        [run.kept[layer].numpy() for layer in plan.keep],
        [run.scores[layer].numpy() for layer in plan.keep],
        None if states is None else states.stacked(),
        None if states is None or not prompt.pictures else inputs.embeds[0, is_visual].detach().float().numpy(),
    )
    return trace, fed


def forced_plan(oracle: Oracle, prompt: Prompt, kept: Sequence[np.ndarray]) -> EagerPlan:
    """The bundle's eager plan with the kept positions given."""
    plan = oracle.plan(prompt)
    return replace(plan, forced={layer: torch.from_numpy(rows) for layer, rows in zip(plan.keep, kept, strict=True)})


def write_records(folder: Path, oracle: Oracle, samples: Samples, steps: int, report: Report = silent) -> "Records":
    """Run the eager model in FP32 and in the bundle's precision over the samples.

    Args:
        folder: an empty folder, to write into.
        oracle: the eager model and its plan.
        samples: the samples to run.
        steps: S, logits compared per prompt.
        report: told the progress.
    """
    dtype = HALF.get(oracle.precision)
    low_precision = None if dtype is None else Eager(lowered(oracle.model, dtype, oracle.fp32_layers), oracle.weights)
    meter, count = _NoiseMeter(), 0
    asked = tracked(samples, "validate: eager", samples.count, report)
    for group in oracle.grouped(((oracle.prompter.chat(sample.turns), sample) for sample in asked), answers=2):
        prompts = [prompt for prompt, _ in group]
        plans = [oracle.plan(prompt) for prompt in prompts]
        rows = [sampled_rows(len(prompt.input_ids)) for prompt in prompts]
        answers = [_tokens_of(oracle, sample) for _, sample in group]
        passes = map(partial(tracing, oracle, oracle.eager), prompts, plans, repeat(steps), answers, rows)
        found = oracle.eager.run(list(passes))
        fp32_traces, tokens = [trace for trace, _ in found], [fed for _, fed in found]
        forced = [forced_plan(oracle, prompt, trace.kept) for prompt, trace in zip(prompts, fp32_traces, strict=True)]
        if any(not load_selector(stage.selector).graded for stage in oracle.prune.schedule):
            near = [replace(plan, jitter=_LAST_BITS) for plan in forced]
            again = oracle.eager.run(list(map(partial(tracing, oracle, oracle.eager), prompts, near, repeat(1))))
            for prompt, plan, fp32, (trace, _) in zip(prompts, plans, fp32_traces, again, strict=True):
                meter.add_ties(prompt, plan, fp32, trace.scores)
        same: list[Trace | None] = [None] * len(group)
        if low_precision is not None and dtype is not None:
            scales = {layer: alpha.to(dtype) for layer, alpha in plans[0].scales.items()}
            halved = [replace(plan, scales=scales) for plan in forced]
            passes = map(partial(tracing, oracle, low_precision), prompts, halved, repeat(steps), tokens, rows)
            for at, (trace, _) in enumerate(low_precision.run(list(passes))):
                meter.add(prompts[at], plans[at], fp32_traces[at], trace)
                same[at] = trace
        for record in map(Record, prompts, tokens, rows, fp32_traces, same):
            _save(folder / _file(count), record)
            count += 1
    about = {
        "version": _VERSION,
        "count": samples.count,
        "samples": samples.name,
        "precision": oracle.precision,
        "steps": steps,
        "noise": asdict(meter.noise()),
    }
    (folder / _ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return Records(folder)


def _tokens_of(oracle: Oracle, sample: Sample) -> list[int]:
    """Tokens of the known answer; none where it is not known."""
    return oracle.prompter.tokenizer.encode(sample.answer, add_special_tokens=False) if sample.answer else []


class Records:
    """The records of a folder, read one at a time.

    Raises:
        CapaError: the folder holds none, or damaged ones.
    """

    def __init__(self, folder: Path, count: int | None = None) -> None:
        self.folder = folder
        path = folder / _ABOUT
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
            if about["version"] != _VERSION:
                raise CapaError(
                    f"{path}: version {about['version']}, this capa-export reads {_VERSION}; store them again"
                )
            noise: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value for name, value in about["noise"].items()
            }
            self.noise = Noise(**noise)
            self.precision: str = about["precision"]
            self.steps: int = about["steps"]
            self.samples: str = about["samples"]
            self._count: int = about["count"] if count is None else min(count, about["count"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CapaError(f"{path}: no golden samples ({error}); store them again") from error

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Record]:
        return (_load(self.folder / _file(index)) for index in range(self._count))

    def files(self) -> list[Path]:
        """The files that hold these records."""
        return [self.folder / _ABOUT, *(self.folder / _file(index) for index in range(self._count))]


def _file(index: int) -> str:
    return f"{index:04}.safetensors"


_TRACES = {"fp32": "oracle", "low_precision": "half"}
"""Fields of `Record` -> the names of their tensors in files."""


def _save(path: Path, record: Record) -> None:
    prompt = record.prompt
    tensors = {
        "input_ids": prompt.input_ids,
        "is_visual": prompt.is_visual,
        "position_ids": prompt.position_ids,
        "rows": record.rows,
        **{f"patches.{index}": picture.patches for index, picture in enumerate(prompt.pictures)},
    }
    for field, name in _TRACES.items():
        trace: Trace | None = getattr(record, field)
        if trace is None:
            continue
        tensors |= {f"{name}.logits": trace.logits, f"{name}.hidden": trace.hidden, f"{name}.features": trace.features}
        tensors |= {f"{name}.kept.{stage}": rows for stage, rows in enumerate(trace.kept)}
        tensors |= {f"{name}.scores.{stage}": scores for stage, scores in enumerate(trace.scores)}
    about = {
        "next_position": prompt.next_position,
        "tokens": record.tokens,
        "pictures": [
            {entry.name: getattr(picture, entry.name) for entry in fields(picture) if entry.name != "patches"}
            for picture in prompt.pictures
        ],
    }
    given = {name: np.ascontiguousarray(array) for name, array in tensors.items() if array is not None}
    try:
        save_file(given, path, metadata={"capa_record": json.dumps(about)})
    except SafetensorError as error:
        raise CapaError(f"{path}: cannot be written: {error}", ExitCode.EXPORT) from error


def _load(path: Path) -> Record:
    try:
        with safe_open(path, framework="np") as file:
            about = json.loads((file.metadata() or {})["capa_record"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping.
        pictures = tuple(
            Picture(tensors[f"patches.{index}"], **(facts | {"grid": facts["grid"] and tuple(facts["grid"])}))
            for index, facts in enumerate(about["pictures"])
        )
        prompt = Prompt(
            tensors["input_ids"], tensors["is_visual"], pictures, tensors["position_ids"], about["next_position"]
        )
        fp32, low_precision = (_trace(tensors, name) for name in _TRACES.values())
        assert fp32 is not None
        return Record(prompt, about["tokens"], tensors["rows"], fp32, low_precision)
    except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:
        raise CapaError(f"{path}: damaged golden sample ({error}); store them again") from error


def _trace(tensors: dict[str, Any], name: str) -> Trace | None:
    if f"{name}.logits" not in tensors:
        return None
    stages = sum(key.startswith(f"{name}.kept.") for key in tensors)
    kept, scores = ([tensors[f"{name}.{what}.{stage}"] for stage in range(stages)] for what in ("kept", "scores"))
    return Trace(
        tensors[f"{name}.logits"], kept, scores, tensors.get(f"{name}.hidden"), tensors.get(f"{name}.features")
    )


class _NoiseMeter:
    """Collects the noise, worst over the prompts."""

    def __init__(self) -> None:
        self._distance = Distance()
        self._scores = np.zeros(0)
        self._iou: list[list[float]] = []
        self._tie_iou: list[list[float]] = []

    def add(self, prompt: Prompt, plan: EagerPlan, fp32: Trace, low_precision: Trace) -> None:
        for pair in zip(low_precision.logits.astype(np.float64), fp32.logits.astype(np.float64), strict=True):
            self._distance.add_logits(*pair)
        self._distance.add_states(low_precision, fp32)
        # maximum() keeps a NaN, which max() would drop.
        errors = np.array(score_errors(prompt, fp32, low_precision))
        self._scores = np.maximum(self._scores, errors) if len(self._scores) else errors
        self._iou.append(list(_own_choice(prompt, plan, fp32, low_precision.scores)))

    def add_ties(self, prompt: Prompt, plan: EagerPlan, fp32: Trace, scores: Sequence[np.ndarray]) -> None:
        self._tie_iou.append(list(_own_choice(prompt, plan, fp32, scores)))

    def noise(self) -> Noise:
        seen = self._distance
        features = VectorDistance() if seen.features is None else seen.features
        iou, tie_iou = (tuple(zip(*found, strict=True)) for found in (self._iou, self._tie_iou))
        return Noise(
            logits=seen.difference,
            hidden=tuple(seen.layer_errors.tolist()),
            features=seen.features_error,
            kl=worse(seen.kl, seen.expected_kl),
            relative_error=seen.relative_error,
            cosine=seen.logits.cosine,
            norm_ratio=seen.logits.length,
            hidden_cosine=tuple(layer.cosine for layer in seen.layers),
            hidden_norm_ratio=tuple(layer.length for layer in seen.layers),
            hidden_difference=tuple(float(np.median(lengths)) for lengths in seen.differences),
            features_cosine=features.cosine,
            features_norm_ratio=features.length,
            scores=tuple(self._scores.tolist()),
            iou=iou,
            tie_iou=tie_iou,
        )


def _own_choice(
    prompt: Prompt, plan: EagerPlan, fp32: Trace, scores_of_stages: Sequence[np.ndarray]
) -> Iterator[float]:
    """Per stage, the IoU of the tokens with the highest scores and those that the oracle kept, of the same tokens."""
    entering = np.arange(len(prompt.input_ids))
    for kept, scores, keep in zip(fp32.kept, scores_of_stages, plan.keep.values(), strict=True):
        is_visual = prompt.is_visual[entering]
        own = best_rows(torch.from_numpy(scores), torch.from_numpy(is_visual), min(keep, int(is_visual.sum())), plan)
        yield overlap(entering[own.numpy()], kept, len(prompt.text_positions))
        entering = kept


def score_errors(prompt: Prompt, fp32: Trace, other: Trace) -> list[float]:
    """Per stage, the largest relative change of a visual token's score that is at least half of the cut."""
    errors: list[float] = []
    entering = np.arange(len(prompt.input_ids))
    for kept, scores, own in zip(fp32.kept, fp32.scores, other.scores, strict=True):
        visual = prompt.is_visual[entering]
        chosen = visual & np.isin(entering, kept)
        near = visual & (scores >= scores[chosen].min(initial=np.inf) / 2)
        errors.append(float((np.abs(own - scores)[near] / scores[near]).max(initial=0.0)))
        entering = kept
    return errors
