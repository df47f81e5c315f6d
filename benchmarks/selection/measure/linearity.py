"""Measures how linear the FFNs are: cosine(x, x + FFN(norm(x))) token by token, and what alpha misses.

L = layers, V = visual tokens, X = text tokens, D = hidden size.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import cosine_similarity

from benchmarks.selection.bed import SelectionBed
from benchmarks.selection.figures import LayerFigures, Linearity
from benchmarks.selection.measure.statistics import spread_of
from capa_export.calibrate.measure import watching_ffns
from capa_export.data.questions import Question
from capa_export.model.eager_plan import EagerPlan
from capa_export.study.evaluate.eager_answers import EagerMethods

__all__ = ["measure", "prefills"]


class _PromptLinearity(NamedTuple):
    """Figures of one prompt."""

    visual_LV: np.ndarray
    text_LX: np.ndarray
    missed_L: np.ndarray
    """|| y - alpha x ||^2 over visual tokens."""
    whole_L: np.ndarray
    """|| y ||^2."""


def measure(bed: SelectionBed, _selectors: Sequence[str], count: int) -> Linearity:
    """Measure linearity on questions that calibration has not seen."""
    calibration, eta = bed.calibration, bed.model.recipe.ffn.eta
    alphas_LD = np.stack([layer.alpha for layer in calibration.layers]).astype(np.float32)
    seen = list(bed.each(partial(_seen, alphas_LD=alphas_LD), count, "linearity"))
    visual_LV = np.concatenate([one.visual_LV for one in seen], axis=1)
    text_LX = np.concatenate([one.text_LX for one in seen], axis=1)
    error_L = np.sqrt(sum(one.missed_L for one in seen) / sum(one.whole_L for one in seen))
    linear = calibration.linear_layers(eta)
    return Linearity(
        eta=eta,
        visual_tokens=visual_LV.shape[1],
        text_tokens=text_LX.shape[1],
        layers=tuple(
            LayerFigures(
                visual=spread_of(visual_LV[layer], eta),
                text=spread_of(text_LX[layer], eta),
                alpha_error=float(error_L[layer]),
                calibration_error=calibration.layers[layer].relative_error,
                linear=layer in linear,
            )
            for layer in range(bed.layers)
        ),
    )


@torch.inference_mode()
def _seen(opened: EagerMethods, question: Question, alphas_LD: np.ndarray) -> _PromptLinearity:
    prompt = opened.model.prompter.chat(question.open())
    is_visual = torch.from_numpy(prompt.is_visual)
    ffns: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    with watching_ffns(opened.eager.text.layers, ffns):
        opened.eager.prefill(opened.inputs(prompt), is_visual, EagerPlan())
    found: list[tuple[np.ndarray, ...]] = []
    for layer, (x_TD, y_TD) in sorted(ffns.items()):
        cosine_T = cosine_similarity(x_TD, y_TD, dim=-1)
        x_VD, y_VD = x_TD[is_visual].double(), y_TD[is_visual].double()
        missed = (y_VD - torch.from_numpy(alphas_LD[layer]) * x_VD).square().sum()
        parts = (cosine_T[is_visual], cosine_T[~is_visual], missed, y_VD.square().sum())
        found.append(tuple(part.numpy() for part in parts))
    return _PromptLinearity(*(np.stack(column) for column in zip(*found, strict=True)))


def prefills(_num_selectors: int) -> int:
    """A question's."""
    return 1
