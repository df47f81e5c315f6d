"""Decides in which layers a scale stands for the FFN of visual tokens: by what the set does to the answers.

The cosine of a single layer does not see what adds up over many, nor what comes of it where tokens are dropped: it is
the first filter, and no more.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

import torch

from capa_export.base.bisection import largest_within
from capa_export.base.progress import Report, silent, tracked
from capa_export.calibrate.scaled_sets import FfnEffect, ScaledSet
from capa_export.calibrate.sums import Calibration
from capa_export.config.recipe import Recipe
from capa_export.config.schedule import Prune, schedule_text
from capa_export.data.samples import Samples
from capa_export.model.agreement import STEPS, Agreement, DenseAnswer, agreeing, answering
from capa_export.model.eager import Eager, EagerPrefill
from capa_export.model.eager_plan import EagerPlan
from capa_export.model.families import Family
from capa_export.model.lockstep import Pass
from capa_export.model.prompt import Prompter

__all__ = ["measure_effect"]


def measure_effect(
    eager: Eager,
    family: Family,
    prompter: Prompter,
    samples: Samples,
    calibration: Calibration,
    recipe: Recipe,
    *,
    stop: Collection[int],
    report: Report = silent,
) -> FfnEffect:
    """Find the largest set of linear layers whose scales keep the next tokens within the budget, as tokens are dropped.

    The layers are put in the order of their harm, and the size of the set is bisected. What pruning itself costs is
    not counted: the reference is the pruned model with all its FFNs.

    Args:
        eager: the model in FP32.
        family: its family.
        prompter: the checkpoint's prompter.
        samples: prompts that the calibration has not seen.
        calibration: says which layers are linear, and what their scales are.
        recipe: the threshold of linearity, the budget, and the schedule.
        stop: tokens that end an answer.
        report: told the progress.
    """
    ffn = recipe.ffn
    linear = sorted(calibration.linear_layers(ffn.eta), key=lambda layer: calibration.layers[layer].relative_error)
    tried: list[ScaledSet] = []
    if linear:
        judge = _Judge(eager, calibration, recipe.prune, report)
        judge.ask(family, prompter, samples, stop)

        def within(count: int) -> bool:
            tried.append(judge.judged(linear[:count]))
            return tried[-1].within(ffn.budget)

        largest_within(len(linear), within)
    return FfnEffect(
        calibration=calibration.digest(),
        eta=ffn.eta,
        budget=ffn.budget,
        schedule=schedule_text(recipe.prune.schedule),
        samples=samples.count,
        tried=tuple(tried),
    )


@dataclass
class _Judge:
    """Dense's answers to the samples, along which sets of layers are judged."""

    eager: Eager
    calibration: Calibration
    prune: Prune
    report: Report
    answers: list[DenseAnswer] = field(default_factory=list)
    """With the logits of the pruned model."""

    @torch.inference_mode()
    def ask(self, family: Family, prompter: Prompter, samples: Samples, stop: Collection[int]) -> None:
        """Let dense answer, and the pruned model follow its answers."""
        every = EagerPlan(keep=dict.fromkeys(self.prune.selectors, 0), selectors=self.prune.selectors)
        asked = tracked(samples, "visual FFNs: dense", samples.count, self.report)
        prompts = (prompter.chat(sample.turns) for sample in asked)
        for group in self.eager.grouped(prompts, lambda prompt: len(prompt.input_ids) + STEPS, caches=1):
            dense = self.eager.run([answering(self.eager, family, prompt, every, stop) for prompt in group])
            pruned = self.eager.run([self._pruned(answer) for answer in dense])
            self.answers += [answer._replace(logits=logits) for answer, (_, logits) in zip(dense, pruned, strict=True)]

    def _pruned(self, answer: DenseAnswer) -> Pass[tuple[EagerPrefill, list[torch.Tensor]]]:
        is_visual = torch.from_numpy(answer.prompt.is_visual)
        return self.eager.following(answer.inputs, is_visual, self._plan(answer), answer.tokens[:-1])

    def _plan(self, answer: DenseAnswer) -> EagerPlan:
        kept = self.prune.num_keep(answer.prompt.image_lengths)
        return EagerPlan(
            keep=dict(zip(self.prune.selectors, kept, strict=True)),
            selectors=self.prune.selectors,
            min_keep_per_image=self.prune.min_keep_per_image,
        )

    @torch.inference_mode()
    def judged(self, layers: Sequence[int]) -> ScaledSet:
        """How far from the pruned model scales in these layers are."""
        scales = {layer: torch.from_numpy(self.calibration.layers[layer].alpha).float() for layer in layers}
        found = list[Agreement]()
        answers = tracked(self.answers, f"visual FFNs: {len(layers)} as scales", len(self.answers), self.report)
        for group in self.eager.grouped(answers, lambda answer: len(answer.prompt.input_ids) + STEPS, caches=1):
            plans = [replace(self._plan(answer), scales=scales) for answer in group]
            found += self.eager.run([agreeing(self.eager, *pair) for pair in zip(group, plans, strict=True)])
        return ScaledSet(
            layers=tuple(sorted(layers)),
            kl=fmean(agreement.kl for agreement in found),
            agreement=fmean(agreement.top1 for agreement in found),
        )
