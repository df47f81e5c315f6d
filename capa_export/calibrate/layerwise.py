"""Calibration of a model that exceeds memory: activations on disk, one layer's weights at a time.

T = prompt tokens, D = hidden size.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from capa_export.base.disk import check_disk
from capa_export.base.progress import Report, silent, tracked
from capa_export.calibrate.measure import Measurement, measuring
from capa_export.calibrate.sums import Calibration
from capa_export.calibrate.unfinished import UnfinishedSums
from capa_export.data.samples import Samples
from capa_export.model.eager_plan import EagerInputs
from capa_export.model.prompt import Prompter
from capa_export.model.source import Source
from capa_export.model.streamed import DECODER, StoredWeights, hollow_model

__all__ = ["calibrate_layerwise"]

_FILE_OVERHEAD = 16 << 10
"""Bytes of a sample's files beside its states and positions: headers, and blocks of the disk that are not full."""


def calibrate_layerwise(
    source: Source,
    prompter: Prompter,
    samples: Samples,
    *,
    checkpoint_digest: str,
    unfinished: UnfinishedSums,
    report: Report = silent,
) -> Calibration:
    """Measure a calibration with the model's own modules, which hold weights only while they run.

    Args:
        source: the checkpoint.
        prompter: the checkpoint's prompter.
        samples: pictures and questions.
        checkpoint_digest: digest of the weights, to store in the calibration.
        unfinished: store of the sums while they grow, and of the hidden states of all samples, [T, D] FP32 each.
        report: told the progress.

    Raises:
        CapaError: the disk is too small, a tensor is missing, or the model yields NaN or infinity.
    """
    before = unfinished.load()
    if before is None:
        _check_disk(source, prompter, samples, unfinished.folder, report)
    weights = StoredWeights(source)
    model = hollow_model(source, weights)
    with torch.no_grad(), measuring(model) as measurement:
        run = _Run(model, weights, samples.count, unfinished, measurement, checkpoint_digest, report)
        if before is not None:
            run.resume(before)
        run.embed(prompter, samples)
        run.decode()
        return measurement.calibration(checkpoint_digest, samples.count)


def _check_disk(source: Source, prompter: Prompter, samples: Samples, folder: Path, report: Report) -> None:
    """Refuse samples whose states exceed the disk; one sample's, and the sums, are there twice for a moment."""
    dims = source.dims.decoder
    lengths = [
        len(prompter.chat(sample.turns).input_ids)
        for sample in tracked(samples, "measure prompts", samples.count, report)
    ]
    per_token = 4 * dims.hidden_size * (1 + dims.deepstack_layers) + 32
    states = sum(length * per_token + _FILE_OVERHEAD for length in lengths) + 4 * dims.hidden_size * max(lengths)
    check_disk(folder, states + 2 * dims.num_layers * 3 * 8 * dims.hidden_size)


@dataclass
class _Run:
    """A calibration in steps: the vision tower on every sample, then each layer on every sample."""

    model: Any
    weights: StoredWeights
    count: int
    """Number of samples."""
    unfinished: UnfinishedSums
    measurement: Measurement
    checkpoint_digest: str
    report: Report
    done: int = 0
    """Number of finished steps, in this run and those that were interrupted."""

    def resume(self, before: Calibration) -> None:
        """Go on from the sums of an interrupted run."""
        self.done = before.samples
        self.measurement.sums[:] = before.layers
        self.measurement.absmax.update(before.absmax)

    def embed(self, prompter: Prompter, samples: Samples) -> None:
        """Run the vision tower, and store what every sample feeds the decoder."""
        model, weights = self.model, self.weights
        if not (indices := self._left(0)):
            return
        left = tracked(islice(samples, indices.start, None), "look at pictures", len(indices), self.report)
        with weights.holding(model, "tower"):
            for index, sample in zip(indices, left, strict=True):
                prompt = prompter.chat(sample.turns)
                is_visual = torch.from_numpy(prompt.is_visual)
                embeds, *others = EagerInputs.of(weights.source.family.eager_inputs(model, prompt))[:3]
                self.measurement.add(is_visual, weights.damaged)
                _write(self._hidden(index, 0), embeds)
                _write(self._others(index), [is_visual, *others])
                self._finish_step()

    def decode(self) -> None:
        """Run the decoder on every sample, one layer on all of them before the next."""
        text, weights = self.model.model.language_model, self.weights
        layers, norm = list(text.layers), text.norm
        text.norm = nn.Identity()
        for number, layer in enumerate(layers):
            if not (indices := self._left(1 + number)):
                continue
            # The model's own forward, for its masks, its rotary tables and what it does between layers.
            text.layers = nn.ModuleList(layer if other is layer else _PassThrough() for other in layers)
            with weights.loaded(layer, f"{DECODER}layers.{number}."):
                for index in indices:
                    self.report("calibrate layer by layer", number * self.count + index, len(layers) * self.count)
                    hidden = torch.load(self._hidden(index, number))
                    is_visual, position_ids, deepstack = torch.load(self._others(index))
                    inputs = EagerInputs(hidden, position_ids, _of_layer(deepstack, number))
                    hidden = text(**inputs.arguments(is_visual), use_cache=False).last_hidden_state
                    self.measurement.add(is_visual, weights.damaged)
                    _write(self._hidden(index, number + 1), hidden)
                    self._finish_step()
                    # Not before its step is on the disk, since it would be the input of that step.
                    self._hidden(index, number).unlink()
        with weights.loaded(norm, f"{DECODER}norm."):
            for index in self._left(1 + len(layers)):
                norm(torch.load(self._hidden(index, len(layers))))
                self.measurement.add(torch.empty(0, dtype=torch.bool), weights.damaged)
                self._finish_step()
        self.report("calibrate layer by layer", len(layers) * self.count, len(layers) * self.count)

    def _left(self, part: int) -> range:
        """Samples that have not been through a part: 0 is the tower, then each layer, then the last norm."""
        return range(min(max(self.done - part * self.count, 0), self.count), self.count)

    def _finish_step(self) -> None:
        self.done += 1
        self.unfinished.keep(self.measurement.calibration(self.checkpoint_digest, self.done))

    def _hidden(self, index: int, layer: int) -> Path:
        """File of a sample's hidden states before a layer."""
        return self.unfinished.folder / f"{index}.{layer}.hidden"

    def _others(self, index: int) -> Path:
        return self.unfinished.folder / f"{index}.others"


def _of_layer(deepstack: Sequence[Tensor], number: int) -> list[Tensor]:
    """DeepStack features such that a run of layer `number` alone adds its own and no others."""
    if number >= len(deepstack):
        return []
    return [*(torch.zeros_like(features) for features in deepstack[:number]), deepstack[number]]


class _PassThrough(nn.Module):
    """Stands in the place of a decoder layer that is not to run."""

    def forward(self, hidden: Tensor, **_: object) -> Tensor:
        return hidden


def _write(path: Path, value: object) -> None:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    # torch's own writer turns a full disk into an error without a number.
    path.write_bytes(buffer.getbuffer())
