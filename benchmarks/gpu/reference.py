"""The graphs that engines are built from, and what ONNX Runtime makes of them on the CPU."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from workload import NUM_VISUAL, checkpoint, embeddings, prompt

from capa_export.config.recipe import load_recipe
from capa_export.config.schedule import kept_tokens
from capa_export.export.graphs import DENSE, write_onnx
from capa_export.export.in_place import embedding_of
from capa_export.model.checkpoint import open_checkpoint
from capa_export.model.families import load_family
from capa_export.model.source import Source
from capa_export.parity.export_error import ExportErrorMeter
from capa_export.parity.selection import overlap
from capa_export.parity.trace import Trace
from capa_export.run.onnx import OnnxModel
from capa_export.run.runtime import RuntimeModel

__all__ = ["PARITY_RATIO", "ReferenceGraphs", "feed", "figures", "trace"]

PARITY_RATIO = 0.75
_RECIPE = load_recipe("qwen25vl")
_STEPS = 4
_LEAST_IOU = 0.98
"""Least IoU of the kept sets: FP16 flips at the cut moved less than this in exports of random models."""


@dataclass(frozen=True)
class ReferenceGraphs:
    """The checkpoint's graphs in FP16, and what ONNX Runtime makes of them."""

    work: Path

    @cached_property
    def folder(self) -> Path:
        """Written by the first who asks; FFN scales of one where the recipe's paper has them, as weights are random."""
        folder = self.work / "onnx"
        if not folder.exists():
            source = Source.of(open_checkpoint(str(checkpoint(self.work))), load_family(_RECIPE.family))
            decoder, partial_ = source.dims.decoder, self.work / "onnx.partial"
            linear = [layer for layer in _RECIPE.ffn.paper_layers if layer < decoder.num_layers]
            scales = {layer: np.ones(decoder.hidden_size) for layer in linear}
            layers = [stage.layer for stage in _RECIPE.prune.schedule]
            write_onnx(source, "fp16", partial_, prune_layers=layers, scales=scales, dense=True)
            partial_.rename(folder)
        return folder

    def reference(self, *, dense: bool) -> Trace:
        """ONNX Runtime's trace of the prompt; kept for the parts that follow."""
        file = self.work / f"reference-{'dense' if dense else 'capa'}.npz"
        if not file.exists():
            model = OnnxModel(self.folder, prefill=DENSE if dense else "prefill.onnx")
            own = trace(model, NUM_VISUAL if dense else kept_tokens(NUM_VISUAL, PARITY_RATIO))
            np.savez(file, logits=own.logits, kept=own.kept[0])
        saved = np.load(file)
        return Trace(saved["logits"], [saved["kept"]])


def trace(model: RuntimeModel[Any], num_keep: int, tokens: Sequence[int] = ()) -> Trace:
    """Logits of prefill and of a few steps, greedy or fed the tokens."""
    given = prompt()
    run = model.prefill(given, [num_keep], feed(model))
    logits, cache = [run.logits], model.batch([run.cache], _STEPS)
    for step in range(_STEPS - 1):
        token = tokens[step] if tokens else int(logits[-1].argmax())
        output, cache = model.step(cache, token, given.next_position + step)
        logits.append(output)
    return Trace(np.stack(logits), run.kept)


def feed(model: RuntimeModel[Any]) -> dict[str, np.ndarray]:
    """The prompt's embeddings, as prefill takes them."""
    return {"inputs_embeds": embeddings(embedding_of(model.folder / "llm").shape[1])}


def figures(own: Trace, reference: Trace) -> dict[str, float]:
    """Compare a run with ONNX Runtime's.

    Raises:
        AssertionError: the recipe's gate for FP16 is not met; its noise of the precision and its clear margins need
            an eager model, and are not measured here.
    """
    gate = _RECIPE.parity.fp16
    num_text = len(prompt().text_positions)
    iou = overlap(own.kept[0], reference.kept[0], num_text)
    found, met = {"kept_iou": iou}, iou >= _LEAST_IOU
    # Logits of other tokens are other logits: of them, the kept sets are all there is to compare.
    if np.array_equal(own.kept[0], reference.kept[0]):
        comparison = ExportErrorMeter("engine", "ONNX Runtime fp16", gate)
        comparison.add(own, reference)
        found |= {"cosine": comparison.distance.logits.cosine, "norm_ratio": comparison.distance.logits.norm_ratio}
        met = met and found["cosine"] >= gate.cosine.limit and found["norm_ratio"] <= gate.norm_ratio.limit
    if not met:
        raise AssertionError(f"the gate is not met: {found}; {gate.model_dump(exclude_none=True)}")
    return found
