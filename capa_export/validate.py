"""Holds the exported graphs against the eager model: export error, dense identity, and the method's own effect.

S = steps, V = vocabulary.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from capa_export.eager import Eager, EagerPlan
from capa_export.export import DENSE
from capa_export.method import method_effect
from capa_export.parity import Comparison, Trace
from capa_export.progress import Report, silent
from capa_export.prompt import Prompt
from capa_export.recipe import Recipe
from capa_export.report import Example
from capa_export.runtime import OnnxModel
from capa_export.samples import Samples
from capa_export.subject import Subject

__all__ = ["compare_onnx", "eager_trace", "validate"]

_NOTES = {
    "fp32": "ONNX Runtime's CPU provider ran everything in FP32.",
    "fp16": "ONNX Runtime's CPU provider computes FP16 partly in FP32: these figures bound the export, not the GPU.",
    "bf16": "ONNX Runtime's CPU provider has no bf16 kernels: the bf16 weights were run in FP32 arithmetic.",
}
_HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


def validate(
    subject: Subject, recipe: Recipe, prompts: Samples, questions: Samples, report: Report = silent
) -> tuple[dict[str, Any], list[Example]]:
    """Compare everything; the result says whether each gate is met, and comes with a few answers to look at.

    Args:
        subject: the bundle and the eager model.
        recipe: its gates and numbers of steps.
        prompts: what the graphs are compared on.
        questions: what the method's effect is measured on.
        report: progress.
    """
    parity = recipe.parity
    built = [subject.prompter(sample.question, [sample.image]) for sample in prompts]
    eager = Eager(subject.model)
    references: list[Trace] = []
    for done, prompt in enumerate(built):
        report("validate: eager", done, len(built))
        references.append(eager_trace(subject, eager, prompt, subject.plan(prompt), parity.steps))
    results = [
        _compare_dense(subject, built, report).as_dict(parity.fp32),
        compare_onnx(subject, "fp32", subject.fp32_onnx, eager, built, references, 0.0, report).as_dict(parity.fp32),
    ]
    effect, examples = method_effect(subject, eager, questions, report)
    if subject.precision != "fp32":
        noise = _precision_noise(subject, eager, built, references, report)
        compared = compare_onnx(subject, subject.precision, subject.onnx, eager, built, references, noise, report)
        results.append(compared.as_dict(getattr(parity, subject.precision)))
    failures = [failure for result in results for failure in result["failures"]]
    parity_report = {
        "version": 1,
        "passed": not failures,
        "failures": failures,
        "prompts": prompts.name,
        "schedule": [stage.model_dump() for stage in subject.schedule],
        "linear_layers": sorted(subject.scales),
        "export_error": results,
        "method_error": effect,
        "notes": [_NOTES[subject.precision], "No engine was run."],
    }
    return parity_report, examples


def eager_trace(
    subject: Subject,
    eager: Eager,
    prompt: Prompt,
    plan: EagerPlan,
    steps: int,
    tokens: Sequence[int] | None = None,
) -> Trace:
    """Greedy over `steps` tokens, or fed the given ones."""
    embeds, position_ids = subject.family.eager_inputs(subject.model, prompt)
    run = eager.prefill(embeds, position_ids, torch.from_numpy(prompt.is_visual), plan)
    logits = [run.logits.numpy()]
    for step in range(steps - 1):
        token = int(logits[-1].argmax()) if tokens is None else tokens[step]
        logits.append(eager.step(run, token, prompt.next_position + step).numpy())
    return Trace(np.stack(logits), [run.kept[layer].numpy() for layer in plan.keep])


def _onnx_trace(model: OnnxModel, prompt: Prompt, num_keep: Sequence[int], tokens: Sequence[int], steps: int) -> Trace:
    run = model.prefill(prompt, num_keep)
    logits, cache = [run.logits], run.cache
    for step in range(steps - 1):
        output, cache = model.step(cache, tokens[step], prompt.next_position + step)
        logits.append(output)
    return Trace(np.stack(logits), run.kept)


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
    model = OnnxModel(folder)
    comparison = Comparison(f"{name} ONNX", "eager CAPA fp32", noise)
    for done, (prompt, reference) in enumerate(zip(prompts, references, strict=True)):
        report(f"validate: {name} ONNX", done, len(prompts))
        steps = len(reference.logits)
        trace = _onnx_trace(model, prompt, subject.num_keep(prompt), reference.tokens, steps)
        flipped, expected = None, reference
        if any(not np.array_equal(a, b) for a, b in zip(trace.kept, reference.kept, strict=True)):
            # A flip at the cut is a discrete choice: count it in the IoU, and measure the drift with the same set.
            plan = subject.plan(prompt)
            forced = {layer: torch.from_numpy(kept) for layer, kept in zip(plan.keep, trace.kept, strict=True)}
            flipped = reference.kept
            expected = eager_trace(subject, eager, prompt, replace(plan, forced=forced), steps, reference.tokens)
        comparison.add(trace, expected, len(prompt.text_positions), flipped=flipped)
    return comparison


def _compare_dense(subject: Subject, prompts: Sequence[Prompt], report: Report) -> Comparison:
    """Ratio 0 without FFN scales against the dense model's own forward pass."""
    model = OnnxModel(subject.fp32_onnx, prefill=DENSE)
    comparison = Comparison("fp32 ONNX, nothing removed", "dense eager fp32")
    for done, prompt in enumerate(prompts):
        report("validate: dense", done, len(prompts))
        with torch.no_grad():
            embeds, position_ids = subject.family.eager_inputs(subject.model, prompt)
            output = subject.model(inputs_embeds=embeds, position_ids=position_ids, use_cache=False)
        everything = np.arange(len(prompt.input_ids))
        reference = Trace(output.logits[:, -1].float().numpy(), [everything] * len(subject.schedule))
        run = model.prefill(prompt, [prompt.num_visual] * len(subject.schedule))
        comparison.add(Trace(run.logits[None], run.kept), reference, len(prompt.text_positions))
    return comparison


def _precision_noise(
    subject: Subject, eager: Eager, prompts: Sequence[Prompt], references: Sequence[Trace], report: Report
) -> float:
    """Largest logit difference that the eager model itself shows in the lower precision, kept sets forced.

    Measured without any exported graph, so that a wrong graph cannot excuse itself. Leaves the model in FP32.
    """
    largest = 0.0
    subject.model.to(_HALF[subject.precision])
    try:
        for done, (prompt, reference) in enumerate(zip(prompts, references, strict=True)):
            report(f"validate: eager {subject.precision}", done, len(prompts))
            plan = subject.plan(prompt)
            forced = {layer: torch.from_numpy(kept) for layer, kept in zip(plan.keep, reference.kept, strict=True)}
            scales = {layer: alpha.to(_HALF[subject.precision]) for layer, alpha in plan.scales.items()}
            plan = replace(plan, forced=forced, scales=scales)
            trace = eager_trace(subject, eager, prompt, plan, len(reference.logits), reference.tokens)
            largest = max(largest, float(np.abs(trace.logits - reference.logits).max()))
    finally:
        subject.model.float()
    return largest
