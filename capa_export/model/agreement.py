"""Measures how far a changed model is from dense along dense's own answer, whatever it would say itself.

V = vocabulary.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from capa_export.base.statistics import kl_divergence
from capa_export.model.eager import Eager
from capa_export.model.eager_plan import EagerInputs, EagerPlan, inputs_for
from capa_export.model.families import Family
from capa_export.model.lockstep import Pass
from capa_export.model.prompt import Prompt

__all__ = ["STEPS", "Agreement", "DenseAnswer", "agreeing", "answering"]

STEPS = 4
"""Tokens of an answer that are compared, at most."""


class Agreement(NamedTuple):
    """Agreement with dense on one prompt, means over the steps."""

    kl: float
    """KL(dense || this) of the next token, in nats."""
    top1: float
    """Share of next tokens that are dense's."""


class DenseAnswer(NamedTuple):
    """A prompt with dense's answer to it."""

    prompt: Prompt
    inputs: EagerInputs
    tokens: Sequence[int]
    """Dense's greedy tokens, all but the last of them fed back; the one that ends the answer is among them."""
    logits: Sequence[Tensor]
    """Dense's logits [V] before each token of the answer."""


@torch.no_grad()
def answering(
    eager: Eager, family: Family, prompt: Prompt, reads: EagerPlan, stop: Collection[int]
) -> Pass[DenseAnswer]:
    """The pass of dense's answer.

    Args:
        eager: the model.
        family: its family.
        prompt: what is asked.
        reads: a plan whose selectors read all that later ones will.
        stop: tokens that end an answer.
    """
    yield "tower"
    inputs = inputs_for(reads, family, eager.model, prompt)
    run = yield from eager.prefilling(inputs, torch.from_numpy(prompt.is_visual), EagerPlan())
    logits, tokens = [run.logits], [int(run.logits.argmax())]
    while len(tokens) < STEPS and tokens[-1] not in stop:
        position_ids = torch.full(run.position_shape, run.next_position + len(tokens) - 1)
        logits.append((yield from eager.stepping(run.cache, tokens[-1], position_ids)))
        tokens.append(int(logits[-1].argmax()))
    return DenseAnswer(prompt, inputs, tokens, logits)


@torch.no_grad()
def agreeing(eager: Eager, dense: DenseAnswer, plan: EagerPlan, family: Family | None = None) -> Pass[Agreement]:
    """The pass of a changed model along dense's answer.

    Args:
        eager: the model.
        dense: what was asked, and dense's answer.
        plan: of the pass.
        family: of a model whose vision tower is changed, too; without it pictures are what dense's made of them.
    """
    is_visual, inputs = torch.from_numpy(dense.prompt.is_visual), dense.inputs
    if family is not None:
        yield "tower"
        inputs = inputs_for(plan, family, eager.model, dense.prompt)
    _, logits = yield from eager.following(inputs, is_visual, plan, dense.tokens[:-1])
    pairs = list(zip(dense.logits, logits, strict=True))
    kl = [kl_divergence(wanted_V, own_V) for wanted_V, own_V in pairs]
    hits = [int(own_V.argmax()) == token for (_, own_V), token in zip(pairs, dense.tokens, strict=True)]
    return Agreement(sum(kl) / len(kl), sum(hits) / len(hits))
