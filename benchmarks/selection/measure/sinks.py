"""Attention sinks among visual tokens, and whether what they contribute falls into two groups.

L = layers, V = visual tokens, D = hidden size.
"""

from collections.abc import Sequence
from math import sqrt
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.selection.bed import SelectionBed
from benchmarks.selection.figures import SinkDefinition, SinkFigures, SinkLayer
from benchmarks.selection.measure.statistics import FEWEST, bimodality, split
from capa_export.calibrate.sums import SINK_THRESHOLD
from capa_export.data.questions import Question
from capa_export.model.eager_plan import EagerPlan
from capa_export.selectors.selector import SelectorChoice
from capa_export.study.evaluate.eager_answers import EagerMethods

__all__ = ["measure", "of_definition", "prefills"]

WIDTH = 4096
"""Width of LLaVA-1.5-7B, for which the threshold was found."""
ATTENTION = 5.0
"""Times the mean visual token's."""
EDGES = tuple(np.round(np.linspace(-3, 4, 36), 1).tolist())


class _PromptSinks(NamedTuple):
    """Figures of one prompt, [L, V] each."""

    phi: np.ndarray
    """Largest |channel| of what enters the layer, over its root mean square."""
    contribution: np.ndarray
    """Contribution to the last prompt token (CAPA, eq. 2)."""
    attention: np.ndarray
    """Attention of the last prompt token, mean over heads."""


def measure(bed: SelectionBed, _selectors: Sequence[str], count: int) -> SinkFigures:
    """Measure sinks by three definitions: the paper's, the same for this width, and by attention."""
    size = bed.model.source.dims.decoder.hidden_size
    seen = list(bed.each(_seen, count, "sinks"))
    phi_LN = np.concatenate([one.phi for one in seen], axis=1)
    level_LN = np.concatenate([_level(one.contribution) for one in seen], axis=1)
    times_LN = np.concatenate([one.attention / one.attention.mean(1, keepdims=True) for one in seen], axis=1)
    scaled = SINK_THRESHOLD * sqrt(size / WIDTH)
    energy = 100 * SINK_THRESHOLD**2 / WIDTH
    marks = {
        "phi": (f"phi > {SINK_THRESHOLD:g}, as in the paper", phi_LN > SINK_THRESHOLD),
        "scaled phi": (
            f"phi > {scaled:.2f}: one channel has {energy:.1f} % of a token's energy, as at the paper's widths",
            phi_LN > scaled,
        ),
        "attention": (f"more than {ATTENTION:g} times the attention of the mean visual token", times_LN > ATTENTION),
    }
    return SinkFigures(
        hidden_size=size,
        visual_tokens=phi_LN.shape[1],
        max_phi=tuple(phi_LN.max(1).tolist()),
        channels=bed.calibration.sink_channels,
        edges=EDGES,
        definitions=tuple(of_definition(name, says, is_LN, level_LN) for name, (says, is_LN) in marks.items()),
    )


def _level(contribution_LV: np.ndarray) -> np.ndarray:
    """log10 of the contribution over the median of its layer and prompt."""
    log_LV = np.log10(np.maximum(contribution_LV, 1e-12))
    return log_LV - np.median(log_LV, axis=1, keepdims=True)


def of_definition(name: str, says: str, is_LN: np.ndarray, level_LN: np.ndarray) -> SinkDefinition:
    """The sinks that are marked, with the levels of their contribution."""

    def shares(levels: np.ndarray) -> tuple[float, ...]:
        counts, _ = np.histogram(np.clip(levels, EDGES[0], EDGES[-1]), EDGES)
        return tuple((counts / max(len(levels), 1)).tolist())

    return SinkDefinition(
        name=name,
        says=says,
        layers=tuple(_of_layer(is_N, level_N) for is_N, level_N in zip(is_LN, level_LN, strict=True)),
        histogram=(shares(level_LN[is_LN]), shares(level_LN[~is_LN])),
    )


def _of_layer(is_N: np.ndarray, level_N: np.ndarray) -> SinkLayer:
    sinks, others = level_N[is_N], level_N[~is_N]
    if not len(sinks) or not len(others):
        return SinkLayer(sinks=len(sinks))
    ratio = float(10 ** (np.median(sinks) - np.median(others)))
    if len(sinks) < FEWEST or sinks.std() == 0:
        return SinkLayer(sinks=len(sinks), contribution=ratio)
    return SinkLayer(sinks=len(sinks), contribution=ratio, coefficient=bimodality(sinks), split=split(sinks))


@torch.inference_mode()
def _seen(opened: EagerMethods, question: Question) -> _PromptSinks:
    prompt = opened.model.prompter.chat(question.open())
    is_visual = torch.from_numpy(prompt.is_visual)
    inputs = opened.inputs(prompt)
    entering: list[torch.Tensor] = [inputs.embeds[0]]

    def watch(_layer: int, hidden_TD: torch.Tensor, _positions: torch.Tensor) -> None:
        entering.append(hidden_TD)

    layers = range(len(opened.eager.text.layers))
    visual: int = prompt.num_visual
    keep = dict.fromkeys(layers, visual)

    def scores(selector: str) -> np.ndarray:
        # A stage that keeps all of them scores, and changes nothing.
        plan = EagerPlan(keep=keep, selectors=dict.fromkeys(layers, SelectorChoice(selector)))
        found = opened.eager.prefill(inputs, is_visual, plan, watch if selector == "capa" else None).scores
        return np.stack([found[layer][is_visual].numpy() for layer in layers])

    contribution_LV = scores("capa")
    x_LVD = torch.stack(entering[:-1]).float()[:, is_visual]
    phi_LV = x_LVD.abs().amax(-1) / (x_LVD.square().mean(-1) + 1e-6).sqrt()
    return _PromptSinks(phi_LV.numpy(), contribution_LV, scores("attention"))


def prefills(_num_selectors: int) -> int:
    """A question's, in which every layer scores."""
    return 4
