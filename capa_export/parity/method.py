"""Measures the method error, in eager FP32: answers of dense, CAPA, and random pruning at the same k.

V = vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from statistics import fmean
from typing import Literal, get_args

import numpy as np
import torch

from capa_export.base.progress import Report, tracked
from capa_export.base.statistics import difference_of_means, difference_of_shares, kl_divergence, wilson
from capa_export.data.samples import Sample, Samples
from capa_export.model.eager import EagerPrefill
from capa_export.model.eager_plan import EagerInputs, EagerPlan, inputs_for
from capa_export.model.lockstep import Pass, together
from capa_export.model.prompt import Prompt
from capa_export.parity.oracle import Oracle
from capa_export.report.pages import Example, KeptMap
from capa_export.report.schema import Method, MethodError
from capa_export.report.words import percent

__all__ = ["measure_method"]

_Name = Literal["dense", "capa", "random"]

_NUM_EXAMPLES = 4
_FEWEST = 6
"""Questions below which no paired test reaches 95 %, even where all of them agree: 2 * 0.5**5 is above 0.05."""


@dataclass(frozen=True)
class _Answer:
    tokens: list[int]
    """The answer's tokens, without the one that ends it."""
    text: str
    prefill: EagerPrefill


@dataclass(frozen=True)
class _Outcome:
    """One method's answer to one question in a few numbers, so that questions cost no memory."""

    right: bool
    top1: bool
    top5: float
    kl: float
    """KL(dense || this) of the first token, in nats; all fields but `right` compare with dense."""
    diverges_at: int | None


def measure_method(
    oracle: Oracle, questions: Samples, seed: int, steps: int, report: Report
) -> tuple[MethodError, list[Example]]:
    """Ask every question of each method; returns the figures, and the first few answers with their kept tokens.

    Args:
        oracle: the eager model and its pruning.
        questions: questions, with or without answers.
        seed: seed of random pruning.
        steps: most tokens of an answer.
        report: told the progress.
    """
    outcomes: dict[_Name, list[_Outcome]] = {name: [] for name in get_args(_Name)}
    examples: list[Example] = []
    removed = False
    asked = enumerate(tracked(questions, "validate: method", questions.count, report))
    prompted = ((oracle.prompter.chat(sample.turns), (index, sample)) for index, sample in asked)
    for group in oracle.grouped(prompted, answers=len(outcomes)):
        passes = [_answering(oracle, prompt, _random_seed(seed, index), steps) for prompt, (index, _) in group]
        for (prompt, (_, sample)), answers in zip(group, oracle.eager.run(passes), strict=True):
            for name, answer in answers.items():
                outcomes[name].append(_outcome(answer, answers["dense"], sample))
            removed = removed or min(oracle.num_keep(prompt)) < prompt.num_visual
            if len(examples) < _NUM_EXAMPLES:
                texts = {name: answer.text for name, answer in answers.items()}
                kept = _kept_maps(prompt, answers["capa"].prefill)
                examples.append(Example(sample.image, sample.question, sample.answer, **texts, kept=kept))
    found = _method_error(outcomes, answered=questions.has_answers, removed=removed)
    return _named(found, oracle.pruned_by), examples


def _named(found: MethodError, pruned: str) -> MethodError:
    """The figures, with `pruned` in the place of CAPA's name."""
    words = tuple(sentence.replace("CAPA", pruned) for sentence in found.words)
    return found.model_copy(update={"pruned": pruned, "words": words})


def _random_seed(seed: int, index: int) -> int:
    return int(np.random.SeedSequence([seed, index]).generate_state(1)[0])


@torch.no_grad()
def _answering(oracle: Oracle, prompt: Prompt, random_seed: int, steps: int) -> Pass[dict[_Name, _Answer]]:
    """A pass of one question, which ends in the greedy answer of each method."""
    capa = oracle.plan(prompt)
    plans: dict[_Name, EagerPlan] = {
        "dense": EagerPlan(),
        "capa": capa,
        "random": replace(capa, random_seed=random_seed),
    }
    yield "tower"
    inputs = inputs_for(capa, oracle.family, oracle.model, prompt)
    answers = yield from together([_answer(oracle, prompt, inputs, plan, steps) for plan in plans.values()])
    return dict(zip(plans, answers, strict=True))


def _answer(oracle: Oracle, prompt: Prompt, inputs: EagerInputs, plan: EagerPlan, steps: int) -> Pass[_Answer]:
    eager = oracle.eager
    run = yield from eager.prefilling(inputs, torch.from_numpy(prompt.is_visual), plan)
    tokens: list[int] = []
    logits = run.logits
    while (token := int(logits.argmax())) not in oracle.eos_token_ids:
        tokens.append(token)
        if len(tokens) == steps:
            break
        position_ids = torch.full(run.position_shape, run.next_position + len(tokens) - 1)
        logits = yield from eager.stepping(run.cache, token, position_ids)
    return _Answer(tokens, oracle.prompter.decode(tokens).strip(), run)


def _outcome(answer: _Answer, dense: _Answer, sample: Sample) -> _Outcome:
    wanted_V, logits_V = dense.prefill.logits, answer.prefill.logits
    wanted, likeliest = (set(logits.topk(5).indices.tolist()) for logits in (wanted_V, logits_V))
    pairs = enumerate(zip_longest(answer.tokens, dense.tokens))
    return _Outcome(
        right=answer.text == sample.answer,
        top1=bool(logits_V.argmax() == wanted_V.argmax()),
        top5=len(wanted & likeliest) / len(wanted),
        kl=kl_divergence(wanted_V, logits_V),
        diverges_at=next((at for at, (token, other) in pairs if token != other), None),
    )


def _kept_maps(prompt: Prompt, run: EagerPrefill) -> tuple[KeptMap, ...]:
    """The kept tokens' places on the picture; empty where the visual tokens make no single grid."""
    picture = prompt.pictures[0] if len(prompt.pictures) == 1 else None
    if picture is None or picture.grid is None:
        return ()
    order = np.cumsum(prompt.is_visual) - 1
    return tuple(
        KeptMap(
            layer,
            *picture.grid,
            tuple(int(order[row]) for row in kept.tolist() if prompt.is_visual[row]),
            square=picture.square,
        )
        for layer, kept in run.kept.items()
    )


def _method_error(outcomes: Mapping[_Name, Sequence[_Outcome]], *, answered: bool, removed: bool) -> MethodError:
    count = len(outcomes["dense"])
    if not count:
        return MethodError(questions=0, words=("No question was asked: the method's error was not measured.",))
    capa, random = outcomes["capa"], outcomes["random"]
    capa_kl, random_kl = [outcome.kl for outcome in capa], [outcome.kl for outcome in random]
    kl_gain = difference_of_means(random_kl, capa_kl) if np.isfinite([capa_kl, random_kl]).all() else None
    capa_right, random_right = [outcome.right for outcome in capa], [outcome.right for outcome in random]
    comparable = removed and count >= _FEWEST
    found = MethodError(
        questions=count,
        methods=tuple(_method(name, of_name, answered=answered) for name, of_name in outcomes.items()),
        kl_gain=kl_gain,
        accuracy_gain=difference_of_shares(capa_right, random_right) if answered else None,
        beats_random=(kl_gain is not None and kl_gain.low > 0) if comparable else None,
    )
    return found.model_copy(update={"words": tuple(_words(found, removed=removed))})


def _method(name: _Name, found: Sequence[_Outcome], *, answered: bool) -> Method:
    accuracy = wilson([outcome.right for outcome in found]) if answered else None
    if name == "dense":
        return Method(name=name, accuracy=accuracy)
    diverged = [outcome.diverges_at for outcome in found if outcome.diverges_at is not None]
    return Method(
        name=name,
        accuracy=accuracy,
        top1=wilson([outcome.top1 for outcome in found]),
        top5=fmean(outcome.top5 for outcome in found),
        kl=fmean(outcome.kl for outcome in found),
        same_answer=wilson([outcome.diverges_at is None for outcome in found]),
        diverges_at=fmean(diverged) if diverged else None,
    )


def _words(found: MethodError, *, removed: bool) -> Iterator[str]:
    """Put the figures in sentences: CAPA against dense and against random pruning."""
    dense, capa, random = found.methods
    assert capa.same_answer is not None and random.same_answer is not None
    same, by_chance = percent(capa.same_answer.value), percent(random.same_answer.value)
    if not removed:
        yield "No visual token was removed, so CAPA and random pruning do the same: neither can beat the other."
    elif found.beats_random is None:
        yield (
            f"{found.questions} questions are too few to say whether CAPA beats random pruning at the same k: "
            f"ask {_FEWEST} or more."
        )
    elif found.kl_gain is None:
        yield "CAPA does not beat random pruning at the same k: the KL from dense is not finite."
    else:
        verdict = "CAPA beats" if found.beats_random else "CAPA does not beat"
        above = "" if found.beats_random else ", which is not above 0"
        yield (
            f"{verdict} random pruning at the same k: KL from dense {capa.kl:.3g} against {random.kl:.3g} nats, "
            f"a gain of {found.kl_gain.low:.3g} to {found.kl_gain.high:.3g}{above}."
        )
    yield f"CAPA gives dense's answer to {same} of {found.questions} questions, random pruning to {by_chance}."
    if dense.accuracy is None:
        yield "The answers are not known, so there is no accuracy."
    elif not dense.accuracy.value:
        yield "The dense model answers nothing right, so accuracy says nothing about pruning here."
    elif found.beats_random is not None:
        yield _words_of_accuracy(found)


def _words_of_accuracy(found: MethodError) -> str:
    _, capa, random = found.methods
    assert found.accuracy_gain is not None and capa.accuracy is not None and random.accuracy is not None
    gain = found.accuracy_gain
    if gain.low > 0:
        verdict = "CAPA is right more often than random pruning"
    elif gain.high < 0:
        verdict = "CAPA is right less often than random pruning"
    else:
        verdict = "Accuracy does not tell CAPA from random pruning"
    shares = f"{percent(capa.accuracy.value)} against {percent(random.accuracy.value)}"
    return f"{verdict}: {shares}, a difference of {100 * gain.low:+.1f} to {100 * gain.high:+.1f} points."
