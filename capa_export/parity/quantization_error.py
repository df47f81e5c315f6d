"""Measures the quantization error: the eager model of rounded weights along the answers of full precision."""

from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING

import torch

from capa_export.base.progress import Report, tracked
from capa_export.model.agreement import STEPS, Agreement, agreeing, answering
from capa_export.model.eager import Eager
from capa_export.model.eager_plan import EagerPlan
from capa_export.model.model import Model
from capa_export.model.quantized.tensor import quantization
from capa_export.model.streamed import StoredWeights, hollow_model
from capa_export.parity.oracle import Oracle
from capa_export.report.schema import QuantizationError

if TYPE_CHECKING:
    from capa_export.data.samples import Samples

__all__ = ["measure_quantization"]


@torch.inference_mode()
def measure_quantization(oracle: Oracle, model: Model, prompts: "Samples", report: Report) -> QuantizationError | None:
    """How far weights that were rounded here are from those of the checkpoint; None where none were.

    Nothing is pruned on either side. The model of full precision is read layer by layer, beside the other.

    Args:
        oracle: has the eager model of the rounded weights.
        model: the checkpoint, with the recipe that rounds them.
        prompts: what is asked.
        report: told the progress.
    """
    if not model.source.rounds:
        return None
    full = replace(model, recipe=model.recipe.unrounded())
    weights = StoredWeights(full.source)
    whole = Eager(hollow_model(full.source, weights), weights)
    found: list[Agreement] = []
    sees_anew = oracle.family if model.source.rounded_tower else None
    asked = tracked(prompts, "validate: quantization", prompts.count, report)
    prompted = (oracle.prompter.chat(sample.turns) for sample in asked)
    for group in whole.grouped(prompted, lambda prompt: len(prompt.input_ids) + STEPS, caches=1):
        passes = [answering(whole, oracle.family, prompt, EagerPlan(), oracle.eos_token_ids) for prompt in group]
        answers = whole.run(passes)
        found += oracle.eager.run([agreeing(oracle.eager, answer, EagerPlan(), sees_anew) for answer in answers])
    return QuantizationError(
        weights=quantization(model.source.tensors) or "",
        prompts=len(found),
        kl=fmean(one.kl for one in found),
        kl_max=max(one.kl for one in found),
        top1=fmean(one.top1 for one in found),
    )
