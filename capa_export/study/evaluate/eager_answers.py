"""Answers of the Hugging Face model itself, dense and pruned, in FP32.

T = prompt tokens, D = hidden size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from capa_export.base.statistics import kl_divergence
from capa_export.calibrate.measure import watching_ffns
from capa_export.calibrate.sums import Calibration
from capa_export.config.schedule import Method
from capa_export.data.questions import Question
from capa_export.model.eager import Eager, EagerPrefill
from capa_export.model.eager_plan import EagerInputs, EagerPlan, inputs_for
from capa_export.model.generation import eos_token_ids
from capa_export.model.model import Model
from capa_export.model.prompt import Prompt
from capa_export.study.evaluate.answers import DENSE, Answer, Answerer, answerer, max_answer_tokens

__all__ = ["EagerAnswers", "EagerMethods"]


@dataclass(frozen=True, kw_only=True)
class EagerAnswers:
    """A picklable recipe of an answerer: a call opens the model in the process that it is made in."""

    model: Model
    methods: Mapping[str, Method]
    calibration: Calibration | None
    """The scales of visual FFNs; None where no method needs them."""
    max_new_tokens: int

    def __call__(self) -> Answerer:
        return answerer(EagerMethods(self).answers)


class EagerMethods:
    """The opened model, and what each method does with a prompt."""

    def __init__(self, given: EagerAnswers) -> None:
        self.given, self.model = given, given.model
        self.eager = Eager(self.model.eager)
        self.stop = set(eos_token_ids(self.model.source.checkpoint.sidecars))
        chosen = [stage.chosen for method in given.methods.values() for stage in method.stages]
        # What all methods together read of a prompt.
        self.every = EagerPlan(keep=dict.fromkeys(range(len(chosen)), 0), selectors=dict(enumerate(chosen)))

    @torch.inference_mode()
    def answers(self, question: Question, wanted: Sequence[str]) -> list[Answer]:
        prompt = self.model.prompter.chat(question.open())
        methods = {name: self.given.methods[name] for name in wanted}
        keeps = {name: self.num_keep(method, prompt) for name, method in methods.items()}
        inputs = self.inputs(prompt)
        dense, cosines = self.dense(prompt, inputs)
        return [
            self._answer(name, prompt, inputs, self.plan(method, keeps[name], cosines), dense)
            for name, method in methods.items()
        ]

    def inputs(self, prompt: Prompt) -> EagerInputs:
        """The inputs that the decoder and the selectors of all methods read."""
        return inputs_for(self.every, self.model.family, self.model.eager, prompt)

    def dense(self, prompt: Prompt, inputs: EagerInputs) -> tuple[EagerPrefill, dict[int, float]]:
        """The prefill of all tokens, and how linear each layer is for them."""
        is_visual = torch.from_numpy(prompt.is_visual)
        seen: dict[int, tuple[Tensor, Tensor]] = {}
        with watching_ffns(self.eager.text.layers, seen):
            run = self.eager.prefill(inputs, is_visual, EagerPlan())
        return run, {layer: _cosine(x_TD, y_TD, is_visual) for layer, (x_TD, y_TD) in seen.items()}

    def num_keep(self, method: Method, prompt: Prompt) -> dict[int, int]:
        """Visual tokens that each layer of a method's schedule keeps.

        Raises:
            CapaError: fewer than a selector can choose.
        """
        prune = method.prune(self.model.recipe.prune.min_keep_per_image)
        if prune is None:
            return {}
        counts = prune.num_keep(prompt.image_lengths)
        return {stage.layer: count for stage, count in zip(prune.schedule, counts, strict=True)}

    def plan(self, method: Method, keep: Mapping[int, int], cosines: Mapping[int, float]) -> EagerPlan:
        """The eager plan of a method for one prompt, by its `num_keep` and the cosines of `dense`."""
        return EagerPlan(
            keep=keep,
            scales=self._scales(method, cosines),
            selectors={stage.layer: stage.chosen for stage in method.stages},
            min_keep_per_image=self.model.recipe.prune.min_keep_per_image,
        )

    def _scales(self, method: Method, cosines: Mapping[int, float]) -> dict[int, Tensor]:
        """Layer -> what stands for the FFN of visual tokens: alpha [D], or 1 where it is left out."""
        calibration = self.given.calibration
        if method.ffn == "full" or calibration is None:
            return {}
        ffn = self.model.recipe.ffn
        if method.ffn == "per-image":
            scaled = [layer for layer, cosine in cosines.items() if cosine > (method.eta or ffn.eta)]
        else:
            scaled = calibration.scaled_layers(ffn, method.eta)
        alphas = {layer: torch.from_numpy(alpha).float() for layer, alpha in calibration.alphas(scaled).items()}
        return {layer: torch.ones_like(alpha) for layer, alpha in alphas.items()} if method.ffn == "skip" else alphas

    def _answer(self, name: str, prompt: Prompt, inputs: EagerInputs, plan: EagerPlan, dense: EagerPrefill) -> Answer:
        run = dense if name == DENSE else self.eager.prefill(inputs, torch.from_numpy(prompt.is_visual), plan)
        first_V = run.logits
        tokens = self.greedy(run, max_answer_tokens(self.model.prompter, prompt, self.given.max_new_tokens))
        return Answer(
            method=name,
            text=self.model.prompter.decode(tokens).strip(),
            tokens=len(tokens),
            kept=list(plan.keep.values())[-1] if plan.keep else prompt.num_visual,
            visual=prompt.num_visual,
            kl=kl_divergence(dense.logits, first_V),
        )

    def greedy(self, run: EagerPrefill, limit: int) -> list[int]:
        """The likeliest tokens, without the one that ends the answer."""
        tokens: list[int] = []
        logits = run.logits
        while (token := int(logits.argmax())) not in self.stop:
            tokens.append(token)
            if len(tokens) == limit:
                break
            logits = self.eager.step(run, token, run.next_position + len(tokens) - 1)
        return tokens


def _cosine(x_TD: Tensor, y_TD: Tensor, is_visual: Tensor) -> float:
    """Mean cosine of x and y over the visual tokens, as a calibration takes it."""
    return float(torch.nn.functional.cosine_similarity(x_TD[is_visual], y_TD[is_visual], dim=-1).double().mean())
