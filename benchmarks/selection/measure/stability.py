"""Measures whether the choice made at prefill holds for the tokens generated after it.

L = layers, T = prompt tokens, V = visual tokens, Q = the last prompt token and the generated ones, H = query heads,
d = head size, W = words of the vocabulary.
"""

from collections import defaultdict
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.selection.bed import SelectionBed
from benchmarks.selection.figures import Drift, RankAgreement, Stability
from benchmarks.selection.measure.compare import at_own_places
from benchmarks.selection.measure.statistics import hellinger, overlap, spearman
from capa_export.base.statistics import difference_of_means
from capa_export.config.schedule import parse_method
from capa_export.data.questions import Question
from capa_export.model.eager import EagerPrefill
from capa_export.model.eager_plan import EagerInputs, EagerPlan
from capa_export.study.evaluate.answers import max_answer_tokens
from capa_export.study.evaluate.eager_answers import EagerMethods

__all__ = ["by_query", "measure", "prefills"]

RATIOS = (0.75, 0.9)


class _PromptStability(NamedTuple):
    """Figures of one prompt."""

    agreement: Mapping[tuple[str, int, int], tuple[float, float, float]]
    """Score, layer and step -> Spearman's correlation, and the overlaps of the best quarter and tenth."""
    drift: Mapping[str, Sequence[float]]
    """Method -> Hellinger distance at each step."""


def measure(bed: SelectionBed, selectors: Sequence[str], count: int) -> Stability:
    """Every selector at its own place, with full FFNs, fed the answer that dense gives."""
    texts = [text for ratio in RATIOS for text in at_own_places(bed, ["capa", *selectors], [ratio], "full")]
    methods = {text: parse_method(text) for text in dict.fromkeys(texts)}
    seen = list(bed.each(_seen, count, "stability", methods))
    figures: dict[tuple[str, int, int], list[tuple[float, float, float]]] = defaultdict(list)
    for one in seen:
        for key, values in one.agreement.items():
            figures[key].append(values)
    drift = {text: [one.drift[text] for one in seen] for text in methods}
    most = max(len(steps) for steps in drift[texts[0]])
    return Stability(
        layer=bed.own_layer,
        prompts=tuple(sum(len(steps) > step for steps in drift[texts[0]]) for step in range(most)),
        agreement=tuple(
            RankAgreement(
                score=score,
                layer=layer,
                step=step,
                prompts=len(values),
                **dict(
                    zip(("spearman", "overlap_quarter", "overlap_tenth"), np.mean(values, axis=0).tolist(), strict=True)
                ),
            )
            for (score, layer, step), values in sorted(figures.items())
        ),
        drift=tuple(_drift(text, drift) for text in methods),
    )


def _drift(text: str, drift: Mapping[str, Sequence[Sequence[float]]]) -> Drift:
    (stage,) = parse_method(text).stages
    rows = drift[text]
    steps = [[row[step] for row in rows if len(row) > step] for step in range(max(map(len, rows)))]
    capa = next(other for other in drift if other.startswith("capa@") and other.split(":")[1] == text.split(":")[1])
    own_mean, capa_mean = ([float(np.mean(row)) for row in drift[which]] for which in (text, capa))
    return Drift(
        selector=stage.selector,
        ratio=stage.ratio,
        steps=tuple(difference_of_means(values, [0.0] * len(values)) for values in steps),
        to_capa=None if text == capa else difference_of_means(own_mean, capa_mean),
    )


@torch.inference_mode()
def _seen(opened: EagerMethods, question: Question) -> _PromptStability:
    prompt = opened.model.prompter.chat(question.open())
    is_visual, inputs = torch.from_numpy(prompt.is_visual), opened.inputs(prompt)
    dense = partial(opened.eager.prefill, inputs, is_visual)
    limit = max_answer_tokens(opened.model.prompter, prompt, opened.given.max_new_tokens)
    answer = opened.greedy(dense(EagerPlan()), limit)
    scores = by_query(opened.eager.text, inputs, is_visual, answer)
    agreement = {
        (score, layer, step): _agreement(own, first)
        for score, values_LQV in scores.items()
        for layer, (first, *later) in enumerate(values_LQV)
        for step, own in enumerate(later, 1)
    }
    full = _forced(opened, dense(EagerPlan()), answer)
    drift: dict[str, list[float]] = {}
    for text, method in opened.given.methods.items():
        plan = opened.plan(method, opened.num_keep(method, prompt), {})
        drift[text] = list(map(hellinger, _forced(opened, dense(plan), answer), full))
    return _PromptStability(agreement, drift)


def _agreement(own_V: np.ndarray, first_V: np.ndarray) -> tuple[float, float, float]:
    quarter, tenth = (overlap(own_V, first_V, max(1, len(own_V) // parts)) for parts in (4, 10))
    return spearman(own_V, first_V), quarter, tenth


def _forced(opened: EagerMethods, run: EagerPrefill, answer: Sequence[int]) -> list[np.ndarray]:
    """Logits [W] that say each token of the answer, and its end."""
    steps = (opened.eager.step(run, token, run.next_position + step) for step, token in enumerate(answer))
    return [logits.numpy() for logits in (run.logits, *steps)]


def by_query(text: Any, inputs: EagerInputs, is_visual: Tensor, answer: Sequence[int]) -> dict[str, np.ndarray]:
    """Contribution (CAPA, eq. 2) and attention, [L, Q, V], that each query gives the visual tokens.

    Prompt and answer run as one row: causal attention makes each query see what it sees when it is generated.
    """
    embeds = torch.cat([inputs.embeds, text.embed_tokens(torch.tensor([answer], dtype=torch.long))], dim=1)
    places = inputs.position_ids
    further = places.max() + 1 + torch.arange(len(answer))
    row = inputs._replace(
        embeds=embeds, position_ids=torch.cat([places, further.expand(*places.shape[:-1], -1)], dim=-1)
    )
    visual = torch.cat([is_visual, is_visual.new_zeros(len(answer))])
    with _watching_attention(text) as seen:
        text(**row.arguments(visual), use_cache=False)
    found: dict[str, list[np.ndarray]] = {"capa": [], "attention": []}
    for layer, (weights_HTT, values_TC) in zip(text.layers, seen, strict=True):
        weights_HQV = weights_HTT[:, len(is_visual) - 1 :, visual]
        heads, size = len(weights_HQV), layer.self_attn.head_dim
        values_VHd = values_TC[visual].unflatten(-1, (-1, size))
        values_VHd = values_VHd.repeat_interleave(heads // values_VHd.shape[1], dim=1)
        weighted_QVHd = torch.einsum("hqv,vhd->qvhd", weights_HQV, values_VHd)
        written_QVD = weighted_QVHd.flatten(2) @ layer.self_attn.o_proj.weight.T
        found["capa"].append(torch.linalg.vector_norm(written_QVD, dim=-1).numpy())
        found["attention"].append(weights_HQV.mean(0).numpy())
    return {name: np.stack(layers) for name, layers in found.items()}


@contextmanager
def _watching_attention(text: Any) -> Generator[list[tuple[Tensor, Tensor]]]:
    """Yield a list that gets, by layer, weights [H, T, T] and values [T, G * d] of the next forward."""
    seen: list[tuple[Tensor, Tensor]] = []
    values: list[Tensor] = []

    def of_values(_module: Any, _inputs: Any, output: Tensor) -> None:
        values.append(output[0].float())

    def of_attention(_module: Any, _inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        seen.append((output[1][0].float(), values[-1]))

    before = text.config._attn_implementation  # noqa: SLF001 - transformers keeps it nowhere else.
    text.set_attn_implementation("eager")
    handles = [layer.self_attn.v_proj.register_forward_hook(of_values) for layer in text.layers]
    handles += [layer.self_attn.register_forward_hook(of_attention) for layer in text.layers]
    try:
        yield seen
    finally:
        text.set_attn_implementation(before)
        for handle in handles:
            handle.remove()


def prefills(num_selectors: int) -> int:
    """A question's, with the steps after each."""
    return 2 * (3 + num_selectors * len(RATIOS))
