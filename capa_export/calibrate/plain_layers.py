"""Decides which decoder layers stay as the checkpoint has them: as few as bring what rounding costs within a budget."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from statistics import fmean

import torch

from capa_export.base.bisection import largest_within
from capa_export.base.progress import Report, silent, tracked
from capa_export.data.samples import Samples
from capa_export.model.agreement import STEPS, Agreement, DenseAnswer, agreeing, answering
from capa_export.model.eager import Eager
from capa_export.model.eager_plan import EagerPlan
from capa_export.model.model import Model
from capa_export.model.quantized.choice import WeightChoice
from capa_export.model.source import Source
from capa_export.model.streamed import StoredWeights, hollow_model

__all__ = ["choose_plain"]


@torch.inference_mode()
def choose_plain(
    model: Model, choice: WeightChoice, samples: Samples, *, stop: Collection[int], report: Report = silent
) -> WeightChoice:
    """The choice with the fewest layers plain that keep the next tokens within the recipe's budget.

    The layers are put in the order of the errors that the choice has for them, and their number is bisected. Weights
    are read layer by layer, and nothing is pruned.

    Args:
        model: the checkpoint, with the recipe that rounds it.
        choice: what samples decided so far.
        samples: prompts of which the choice has seen none.
        stop: tokens that end an answer.
        report: told the progress.
    """
    full = replace(model, recipe=model.recipe.model_copy(update={"quantize": None}))
    whole = _streamed(full.source)
    answers: list[DenseAnswer] = []
    asked = tracked(samples, "auto-precision: full precision", samples.count, report)
    prompts = (model.prompter.chat(sample.turns) for sample in asked)
    for group in whole.grouped(prompts, lambda prompt: len(prompt.input_ids) + STEPS, caches=1):
        answers += whole.run([answering(whole, model.family, prompt, EagerPlan(), stop) for prompt in group])
    worst = sorted(range(len(choice.errors)), key=lambda layer: choice.errors[layer], reverse=True)
    tried: list[tuple[int, float]] = []

    def with_rounded(count: int) -> WeightChoice:
        return choice.with_plain(worst[: len(worst) - count])

    def within(count: int) -> bool:
        chosen = with_rounded(count)
        eager = _streamed(replace(model, choice=chosen).source)
        tried.append((len(chosen.plain), _kl(eager, answers, len(chosen.plain), report)))
        return tried[-1][1] <= model.recipe.quantization_budget

    return replace(
        with_rounded(largest_within(len(worst), within)), tried=tuple(tried), budget=model.recipe.quantization_budget
    )


def _streamed(source: Source) -> Eager:
    weights = StoredWeights(source)
    return Eager(hollow_model(source, weights), weights)


def _kl(eager: Eager, answers: Sequence[DenseAnswer], num_plain: int, report: Report) -> float:
    """Mean KL(full precision || this) of the next token along the answers of full precision, in nats."""
    found: list[Agreement] = []
    known = tracked(answers, f"auto-precision: {num_plain} layers plain", len(answers), report)
    for group in eager.grouped(known, lambda answer: len(answer.prompt.input_ids) + STEPS, caches=1):
        found += eager.run([agreeing(eager, answer, EagerPlan()) for answer in group])
    return fmean(agreement.kl for agreement in found)
