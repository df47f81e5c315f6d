"""What the method itself does to the answers, in eager FP32: dense, CAPA, and random pruning at the same k."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from capa_export.eager import Eager, EagerInputs, EagerPlan, Prefill
from capa_export.progress import Report, tracked
from capa_export.prompt import Prompt
from capa_export.report import Example, KeptMap
from capa_export.samples import Samples
from capa_export.subject import Subject

__all__ = ["method_effect"]

_NUM_EXAMPLES = 4
_ANSWER_TOKENS = 4


@dataclass(frozen=True)
class _Answer:
    text: str
    prefill: Prefill
    first_logits: torch.Tensor
    """[V], of the first token."""


def method_effect(
    subject: Subject, eager: Eager, questions: Samples, report: Report
) -> tuple[dict[str, Any], list[Example]]:
    """Ask every question of each method; returns the figures, and the first few answers with their kept tokens."""
    right = {"dense": 0, "capa": 0, "random": 0}
    same_as_dense = {"capa": 0, "random": 0}
    divergence = {"capa": 0.0, "random": 0.0}
    examples: list[Example] = []
    for done, sample in enumerate(tracked(questions, "validate: accuracy", questions.count, report)):
        prompt = subject.prompter.chat(sample.turns)
        capa = subject.plan(prompt)
        plans = {"dense": EagerPlan(), "capa": capa, "random": replace(capa, random_seed=done)}
        inputs = EagerInputs.of(subject.family.eager_inputs(subject.model, prompt))
        answers = {method: _answer(subject, eager, prompt, inputs, plan) for method, plan in plans.items()}
        for method, answer in answers.items():
            right[method] += answer.text == sample.answer
        dense = answers["dense"].first_logits
        for method in same_as_dense:
            logits = answers[method].first_logits
            same_as_dense[method] += int(logits.argmax() == dense.argmax())
            divergence[method] += _kl(dense, logits)
        if len(examples) < _NUM_EXAMPLES:
            texts = {method: answer.text for method, answer in answers.items()}
            kept = _kept_maps(prompt, answers["capa"].prefill)
            examples.append(Example(sample.image, sample.question, sample.answer, **texts, kept=kept))
    count = max(questions.count, 1)
    effect: dict[str, Any] = {
        "questions": questions.count,
        "first_token_same_as_dense": {method: number / count for method, number in same_as_dense.items()},
        "kl_from_dense": {method: total / count for method, total in divergence.items()},
    }
    if questions.has_answers:
        effect["accuracy"] = {method: number / count for method, number in right.items()}
    return effect, examples


def _answer(subject: Subject, eager: Eager, prompt: Prompt, inputs: EagerInputs, plan: EagerPlan) -> _Answer:
    """Greedy, at most a few tokens."""
    is_visual = torch.from_numpy(prompt.is_visual)
    run = eager.prefill(inputs.embeds, inputs.position_ids, is_visual, plan, inputs.deepstack)
    tokens: list[int] = []
    logits = run.logits
    while len(tokens) < _ANSWER_TOKENS and (token := int(logits.argmax())) not in subject.eos_token_ids:
        tokens.append(token)
        logits = eager.step(run, token, run.next_position + len(tokens) - 1)
    return _Answer(subject.prompter.decode(tokens).strip(), run, run.logits)


def _kept_maps(prompt: Prompt, run: Prefill) -> tuple[KeptMap, ...]:
    """Where the kept tokens lie on the picture; nothing where the visual tokens make no single grid."""
    grid = prompt.pictures[0].grid if len(prompt.pictures) == 1 else None
    if grid is None:
        return ()
    order = np.cumsum(prompt.is_visual) - 1
    return tuple(
        KeptMap(layer, *grid, tuple(int(order[row]) for row in kept.tolist() if prompt.is_visual[row]))
        for layer, kept in run.kept.items()
    )


def _kl(dense: torch.Tensor, other: torch.Tensor) -> float:
    """KL(dense || other) of the next-token distributions, in nats."""
    p, q = (logits.double().log_softmax(-1) for logits in (dense, other))
    return float((p.exp() * (p - q)).sum())
