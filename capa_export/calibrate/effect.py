"""Decides in which layers a scale stands for the FFN of visual tokens: by what the set does to the answers.

The cosine of a single layer does not see what adds up over many: it is the first filter, and no more.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import torch

from capa_export.base.progress import Report, silent, tracked
from capa_export.calibrate.scaled_sets import FfnEffect, ScaledSet
from capa_export.calibrate.sums import Calibration
from capa_export.config.recipe import FFN
from capa_export.data.samples import Samples
from capa_export.model.agreement import STEPS, Agreement, DenseAnswer, agreeing, answering
from capa_export.model.eager import Eager, EagerPlan
from capa_export.model.families import Family
from capa_export.model.prompt import Prompter

__all__ = ["measure_effect"]


def measure_effect(
    eager: Eager,
    family: Family,
    prompter: Prompter,
    samples: Samples,
    calibration: Calibration,
    ffn: FFN,
    *,
    stop: Collection[int],
    report: Report = silent,
) -> FfnEffect:
    """Find the largest set of linear layers whose scales keep dense's answers within the budget, all tokens kept.

    The layers are put in the order of their harm, and the size of the set is bisected.

    Args:
        eager: the model in FP32.
        family: its family.
        prompter: the checkpoint's prompter.
        samples: prompts that the calibration has not seen.
        calibration: says which layers are linear, and what their scales are.
        ffn: the threshold of linearity, and the budget.
        stop: tokens that end an answer.
        report: told the progress.
    """
    linear = sorted(calibration.linear_layers(ffn.eta), key=lambda layer: calibration.layers[layer].relative_error)
    tried: list[ScaledSet] = []
    if linear:
        judge = _Judge(eager, calibration, report)
        judge.ask(family, prompter, samples, stop)
        tried.append(judge.judged(linear))
        within, beyond = (len(linear), 0) if tried[0].within(ffn.budget) else (0, len(linear))
        while beyond - within > 1:
            middle = (within + beyond) // 2
            tried.append(judge.judged(linear[:middle]))
            within, beyond = (middle, beyond) if tried[-1].within(ffn.budget) else (within, middle)
    return FfnEffect(
        calibration=calibration.digest(),
        eta=ffn.eta,
        budget=ffn.budget,
        samples=samples.count,
        tried=tuple(tried),
    )


@dataclass
class _Judge:
    """Dense's answers to the samples, along which sets of layers are judged."""

    eager: Eager
    calibration: Calibration
    report: Report
    answers: list[DenseAnswer] = field(default_factory=list)

    @torch.inference_mode()
    def ask(self, family: Family, prompter: Prompter, samples: Samples, stop: Collection[int]) -> None:
        """Let dense answer."""
        asked = tracked(samples, "visual FFNs: dense", samples.count, self.report)
        prompts = (prompter.chat(sample.turns) for sample in asked)
        for group in self.eager.grouped(prompts, lambda prompt: len(prompt.input_ids) + STEPS, caches=1):
            passes = [answering(self.eager, family, prompt, EagerPlan(), stop) for prompt in group]
            self.answers += self.eager.run(passes)

    @torch.inference_mode()
    def judged(self, layers: Sequence[int]) -> ScaledSet:
        """How far from dense scales in these layers are."""
        scales = {layer: torch.from_numpy(self.calibration.layers[layer].alpha).float() for layer in layers}
        plan, found = EagerPlan(scales=scales), list[Agreement]()
        answers = tracked(self.answers, f"visual FFNs: {len(layers)} as scales", len(self.answers), self.report)
        for group in self.eager.grouped(answers, lambda dense: len(dense.prompt.input_ids) + STEPS, caches=1):
            found += self.eager.run([agreeing(self.eager, dense, plan) for dense in group])
        return ScaledSet(
            layers=tuple(sorted(layers)),
            kl=fmean(agreement.kl for agreement in found),
            agreement=fmean(agreement.top1 for agreement in found),
        )
