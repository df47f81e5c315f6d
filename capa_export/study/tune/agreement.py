"""Measures how far a method is from dense along dense's own answer, in eager FP32.

V = vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from capa_export.base.statistics import kl_divergence
from capa_export.calibrate.sums import Calibration
from capa_export.config.schedule import Method
from capa_export.data.samples import Sample
from capa_export.model.eager import Eager, EagerInputs, EagerPlan, inputs_for
from capa_export.model.generation import eos_token_ids
from capa_export.model.model import Model
from capa_export.model.prompt import Prompt
from capa_export.selectors.selector import SelectorChoice
from capa_export.study.tune.candidates import linear_layers

__all__ = ["STEPS", "Agreement", "DenseSample", "Judge"]

STEPS = 4
"""Tokens of an answer that are compared, at most."""


class Agreement(NamedTuple):
    """Agreement of one method with dense on one sample, means over its steps."""

    kl: float
    """KL(dense || method) of the next token, in nats."""
    top1: float
    """Share of next tokens that are dense's."""


class DenseSample(NamedTuple):
    """A sample with dense's answer, as every method is fed it."""

    prompt: Prompt
    inputs: EagerInputs
    answer: Sequence[int]
    """Dense's greedy tokens, all but the last of them fed back."""
    logits: Sequence[Tensor]
    """Dense's logits [V] before each token of the answer."""


class Judge:
    """Runs the model, dense and pruned, on samples."""

    def __init__(self, model: Model, calibration: Calibration, selectors: Sequence[str]) -> None:
        self.model, self.calibration = model, calibration
        self.eager = Eager(model.eager)
        self.stop = set(eos_token_ids(model.source.checkpoint.sidecars))
        # What all of them together read of a prompt.
        chosen = dict(enumerate(SelectorChoice(name) for name in selectors))
        self.every = EagerPlan(keep=dict.fromkeys(chosen, 0), selectors=chosen)

    @torch.inference_mode()
    def run_dense(self, sample: Sample) -> DenseSample:
        """Run dense; the end of its answer is a token too."""
        prompt = self.model.prompter.chat(sample.turns)
        inputs = inputs_for(self.every, self.model.family, self.model.eager, prompt)
        run = self.eager.prefill(inputs, torch.from_numpy(prompt.is_visual), EagerPlan())
        logits, answer = [run.logits], [int(run.logits.argmax())]
        while len(answer) < STEPS and answer[-1] not in self.stop:
            logits.append(self.eager.step(run, answer[-1], run.next_position + len(answer) - 1))
            answer.append(int(logits[-1].argmax()))
        return DenseSample(prompt, inputs, answer, logits)

    @torch.inference_mode()
    def agreement(self, method: Method, sample: DenseSample) -> Agreement:
        """Measure a method along dense's answer, whatever the method itself would say."""
        run = self.eager.prefill(sample.inputs, torch.from_numpy(sample.prompt.is_visual), self._plan(method, sample))
        kl = [kl_divergence(sample.logits[0], run.logits)]
        hits = [int(run.logits.argmax()) == sample.answer[0]]
        for at, token in enumerate(sample.answer[:-1]):
            logits = self.eager.step(run, token, run.next_position + at)
            kl.append(kl_divergence(sample.logits[at + 1], logits))
            hits.append(int(logits.argmax()) == sample.answer[at + 1])
        return Agreement(sum(kl) / len(kl), sum(hits) / len(hits))

    def _plan(self, method: Method, sample: DenseSample) -> EagerPlan:
        min_keep = self.model.recipe.prune.min_keep_per_image
        prune = method.prune(min_keep)
        assert prune is not None
        kept = prune.num_keep(sample.prompt.image_lengths)
        return EagerPlan(
            keep={stage.layer: count for stage, count in zip(method.stages, kept, strict=True)},
            scales={
                layer: torch.from_numpy(self.calibration.layers[layer].alpha).float()
                for layer in linear_layers(method, self.model.recipe, self.calibration)
            },
            selectors=prune.selectors,
            min_keep_per_image=min_keep,
        )
