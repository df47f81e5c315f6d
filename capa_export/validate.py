"""Holds the exported graphs against the eager model: export error, dense identity, and the method's own effect.

S = steps, V = vocabulary.
"""

from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from capa_export.eager import Eager, EagerInputs, EagerPlan
from capa_export.export import DENSE
from capa_export.method import method_effect
from capa_export.parity import Comparison, Trace
from capa_export.progress import Report, silent, tracked
from capa_export.prompt import Prompt
from capa_export.recipe import Recipe
from capa_export.report import Example
from capa_export.runtime import Model, OnnxModel
from capa_export.samples import Samples
from capa_export.subject import Subject

if TYPE_CHECKING:
    from capa_export.engine_runtime import EngineModel

__all__ = ["compare_onnx", "eager_trace", "precision_noise", "validate"]

_NOTES = {
    "fp32": "ONNX Runtime's CPU provider ran everything in FP32.",
    "fp16": "ONNX Runtime's CPU provider computes FP16 partly in FP32: these figures bound the export, not the GPU.",
    "bf16": "ONNX Runtime's CPU provider has no bf16 kernels: the bf16 weights were run in FP32 arithmetic.",
}
_HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


def validate(
    subject: Subject,
    recipe: Recipe,
    prompts: Samples,
    questions: Samples,
    report: Report = silent,
    engine: "EngineModel | None" = None,
) -> tuple[dict[str, Any], list[Example]]:
    """Compare everything; the result says whether each gate is met, and comes with a few answers to look at.

    Args:
        subject: the bundle and the eager model.
        recipe: its gates and numbers of steps.
        prompts: what the graphs are compared on.
        questions: what the method's effect is measured on.
        report: progress.
        engine: the bundle's engines, to be held against the eager model and the ONNX files by the same gates.
    """
    parity = recipe.parity
    built = [subject.prompter.chat(sample.turns) for sample in prompts]
    if engine is not None:
        engine.check(built, [subject.num_keep(prompt) for prompt in built], parity.steps)
    eager = Eager(subject.model)
    references = [
        eager_trace(subject, eager, prompt, subject.plan(prompt), parity.steps)
        for prompt in tracked(built, "validate: eager", len(built), report)
    ]
    results = [_compare_dense(subject, built, parity.steps, report).as_dict(parity.fp32)]
    # What the bundle holds; before it, where that is not FP32, the same graphs in FP32.
    artefacts = {"fp32": subject.fp32_onnx, subject.precision: subject.onnx}
    noise, onnx_traces = 0.0, []
    for precision, folder in artefacts.items():
        noise = precision_noise(subject, precision, built, references, report)
        what = f"{precision} ONNX"
        traces = _traces(subject, what, OnnxModel(folder), built, references, report)
        if engine is not None:
            traces = onnx_traces = list(traces)
        compared = _against_eager(subject, what, eager, built, traces, references, noise)
        results.append(compared.as_dict(getattr(parity, precision)))
    notes = [_NOTES[subject.precision]]
    if engine is None:
        notes.append("No engine was run.")
    else:
        what = f"{subject.precision} engine"
        own = list(_traces(subject, what, engine, built, references, report))
        against_onnx = _against_onnx(subject, what, built, own, onnx_traces, noise)
        compared = [_against_eager(subject, what, eager, built, own, references, noise)]
        if against_onnx.prompts:
            compared.append(against_onnx)
        results += [one.as_dict(getattr(parity, subject.precision)) for one in compared]
        notes.append(
            f"The engines ran on {engine.gpu.name}; engine and ONNX kept the same tokens on {against_onnx.prompts} of "
            f"{len(built)} prompts, and are held against each other on those."
        )
    effect, examples = method_effect(subject, eager, questions, report)
    failures = [failure for result in results for failure in result["failures"]]
    parity_report = {
        "version": 1,
        "passed": not failures,
        "failures": failures,
        "prompts": prompts.name,
        "schedule": [stage.model_dump() for stage in subject.prune.schedule],
        "linear_layers": sorted(subject.scales),
        "export_error": results,
        "method_error": effect,
        "notes": [*notes, *_few_pictures(prompts)],
    }
    return parity_report, examples


def _few_pictures(prompts: Samples) -> list[str]:
    different = len(prompts.conversations or prompts.files)
    if prompts.has_answers or different >= prompts.count:
        return []
    what = "conversations" if prompts.conversations else "pictures"
    return [f"Only {different} different {what} for {prompts.count} prompts: give as many in --images."]


def eager_trace(
    subject: Subject,
    eager: Eager,
    prompt: Prompt,
    plan: EagerPlan,
    steps: int,
    tokens: Sequence[int] | None = None,
) -> Trace:
    """Greedy over `steps` tokens, or fed the given ones."""
    inputs = EagerInputs.of(subject.family.eager_inputs(eager.model, prompt))
    is_visual = torch.from_numpy(prompt.is_visual)
    run = eager.prefill(inputs.embeds, inputs.position_ids, is_visual, plan, inputs.deepstack)
    logits = [run.logits.numpy()]
    for step in range(steps - 1):
        token = int(logits[-1].argmax()) if tokens is None else tokens[step]
        logits.append(eager.step(run, token, run.next_position + step).numpy())
    kept = [run.kept[layer].numpy() for layer in plan.keep]
    return Trace(np.stack(logits), kept, [run.scores[layer].numpy() for layer in plan.keep])


def _trace(model: Model[Any], prompt: Prompt, num_keep: Sequence[int], tokens: Sequence[int], steps: int) -> Trace:
    run = model.prefill(prompt, num_keep)
    logits, cache = [run.logits], model.batch([run.cache], steps)
    for step in range(steps - 1):
        output, cache = model.step(cache, tokens[step], prompt.next_position + step)
        logits.append(output)
    return Trace(np.stack(logits), run.kept)


def _traces(
    subject: Subject,
    what: str,
    model: Model[Any],
    prompts: Sequence[Prompt],
    references: Sequence[Trace],
    report: Report,
) -> Iterator[Trace]:
    """What a model makes of every prompt, fed the tokens of the references."""
    pairs = zip(prompts, references, strict=True)
    for prompt, reference in tracked(pairs, f"validate: {what}", len(prompts), report):
        yield _trace(model, prompt, subject.num_keep(prompt), reference.tokens, len(reference.logits))


def compare_onnx(
    subject: Subject,
    name: str,
    folder: Path,
    eager: Eager,
    prompts: Sequence[Prompt],
    references: Sequence[Trace],
    noise: float,
    report: Report = silent,
) -> Comparison:
    """One ONNX against eager CAPA in FP32."""
    what = f"{name} ONNX"
    traces = _traces(subject, what, OnnxModel(folder), prompts, references, report)
    return _against_eager(subject, what, eager, prompts, traces, references, noise)


def _against_eager(
    subject: Subject,
    what: str,
    eager: Eager,
    prompts: Sequence[Prompt],
    traces: Iterable[Trace],
    references: Sequence[Trace],
    noise: float,
) -> Comparison:
    comparison = Comparison(what, "eager CAPA fp32", noise)
    for prompt, trace, reference in zip(prompts, traces, references, strict=True):
        flipped, expected = None, reference
        if not _same_kept(trace, reference):
            # A flip at the cut is a discrete choice: count it in the IoU, and measure the drift with the same set.
            plan = subject.plan(prompt)
            forced = {layer: torch.from_numpy(kept) for layer, kept in zip(plan.keep, trace.kept, strict=True)}
            flipped = reference
            expected = eager_trace(
                subject, eager, prompt, replace(plan, forced=forced), len(reference.logits), reference.tokens
            )
        comparison.add(trace, expected, len(prompt.text_positions), flipped=flipped)
    return comparison


def _against_onnx(
    subject: Subject,
    what: str,
    prompts: Sequence[Prompt],
    traces: Sequence[Trace],
    references: Sequence[Trace],
    noise: float,
) -> Comparison:
    """An engine against its ONNX file, on the prompts of which both kept the same tokens.

    ONNX files cannot be made to keep another's; where the sets differ, the eager model is what both are held against.
    """
    comparison = Comparison(what, f"{subject.precision} ONNX", noise)
    for prompt, trace, reference in zip(prompts, traces, references, strict=True):
        if _same_kept(trace, reference):
            comparison.add(trace, reference, len(prompt.text_positions))
    return comparison


def _same_kept(trace: Trace, other: Trace) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(trace.kept, other.kept, strict=True))


def _compare_dense(subject: Subject, prompts: Sequence[Prompt], steps: int, report: Report) -> Comparison:
    """Nothing removed and no FFN scales, against the dense model's own forward pass."""
    model = OnnxModel(subject.fp32_onnx, prefill=DENSE)
    comparison = Comparison("fp32 ONNX, nothing removed", "dense eager fp32")
    for prompt in tracked(prompts, "validate: dense", len(prompts), report):
        everything = np.arange(len(prompt.input_ids))
        stages = len(subject.prune.schedule)
        reference = Trace(_dense_logits(subject, prompt, steps), [everything] * stages)
        trace = _trace(model, prompt, [prompt.num_visual] * stages, reference.tokens, steps)
        comparison.add(trace, reference, len(prompt.text_positions))
    return comparison


@torch.no_grad()
def _dense_logits(subject: Subject, prompt: Prompt, steps: int) -> np.ndarray:
    """[S, V] of the Hugging Face decoder's own forward pass, greedy."""
    text, head = subject.model.model.language_model, subject.model.lm_head
    inputs = EagerInputs.of(subject.family.eager_inputs(subject.model, prompt))
    next_position = int(inputs.position_ids.max()) + 1
    output = text(**inputs.arguments(torch.from_numpy(prompt.is_visual)), use_cache=True)
    logits = [head(output.last_hidden_state[0, -1]).float()]
    for step in range(steps - 1):
        output = text(
            input_ids=logits[-1].argmax().view(1, 1),
            position_ids=torch.full((*inputs.position_ids.shape[:-1], 1), next_position + step),
            past_key_values=output.past_key_values,
            use_cache=True,
        )
        logits.append(head(output.last_hidden_state[0, -1]).float())
    return torch.stack(logits).numpy()


def precision_noise(
    subject: Subject,
    precision: str,
    prompts: Sequence[Prompt],
    references: Sequence[Trace],
    report: Report = silent,
) -> float:
    """Largest logit difference that the eager model itself shows in a lower precision, kept sets forced.

    Measured on a copy and without any exported graph: a wrong graph cannot excuse itself, and the reference stays
    what it was. 0 for FP32; not a number where the eager model overflows.
    """
    if precision == "fp32":
        return 0.0
    eager = Eager(_lowered(subject.model, _HALF[precision]))
    largest = 0.0
    pairs = zip(prompts, references, strict=True)
    for prompt, reference in tracked(pairs, f"validate: eager {precision}", len(prompts), report):
        plan = subject.plan(prompt)
        forced = {layer: torch.from_numpy(kept) for layer, kept in zip(plan.keep, reference.kept, strict=True)}
        scales = {layer: alpha.to(_HALF[precision]) for layer, alpha in plan.scales.items()}
        plan = replace(plan, forced=forced, scales=scales)
        trace = eager_trace(subject, eager, prompt, plan, len(reference.logits), reference.tokens)
        largest = float(np.maximum(largest, np.abs(trace.logits - reference.logits).max()))
    return largest


def _lowered(model: Any, dtype: torch.dtype) -> Any:
    """A copy with weights in `dtype`; buffers, the rotary frequencies, stay in FP32 as they do when it is loaded so."""
    lowered = deepcopy(model).to(dtype)
    buffers = dict(model.named_buffers())
    for name, buffer in lowered.named_buffers():
        buffer.data = buffers[name].data.clone()
    return lowered
