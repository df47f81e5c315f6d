"""What every family's decoder is held to: the graph says what the eager model says."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from capa_export.model.eager import Eager
from capa_export.model.eager_plan import EagerPlan, inputs_for
from capa_export.model.families import Family
from capa_export.model.prompt import Prompt
from capa_export.run.onnx import OnnxModel
from capa_export.selectors.selector import SelectorChoice

__all__ = ["compare"]

_STEPS = 6


def compare(
    family: Family,
    model: Any,
    onnx: OnnxModel,
    prompt: Prompt,
    keep: Mapping[int, int],
    scales: Mapping[int, np.ndarray],
    tolerance: float,
    *,
    selectors: Mapping[int, SelectorChoice] = MappingProxyType({}),
    min_keep_per_image: int = 1,
) -> None:
    """Kept positions, and logits of the prompt and of a few more tokens, within `tolerance` of the largest."""
    eager = Eager(model)
    alphas = {layer: torch.from_numpy(alpha).float() for layer, alpha in scales.items()}
    plan = EagerPlan(keep, alphas, selectors, min_keep_per_image=min_keep_per_image)
    inputs = inputs_for(plan, family, model, prompt)
    is_visual = torch.from_numpy(prompt.is_visual)
    expected = eager.prefill(inputs, is_visual, plan)
    run = onnx.prefill(prompt, list(keep.values()))
    for kept, layer in zip(run.kept, keep, strict=True):
        np.testing.assert_array_equal(kept, expected.kept[layer].numpy())
    logits, wanted, cache = run.logits, expected.logits, run.cache
    for step in range(_STEPS):
        np.testing.assert_allclose(logits, wanted.numpy(), atol=tolerance * float(wanted.abs().max()), rtol=0)
        token = int(wanted.argmax())
        wanted = eager.step(expected, token, prompt.next_position + step)
        logits, cache = onnx.step(cache, token, prompt.next_position + step)
