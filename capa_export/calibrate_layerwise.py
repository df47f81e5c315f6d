"""Calibration of a model that exceeds memory: activations on disk, one layer's weights at a time.

T = prompt tokens, D = hidden size.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from capa_export.bind import check_disk
from capa_export.calibrate import Measurement, measuring
from capa_export.calibration import Calibration
from capa_export.eager import EagerInputs
from capa_export.export import Source
from capa_export.progress import Report, silent, tracked
from capa_export.prompt import Prompter
from capa_export.samples import Samples
from capa_export.streamed import DECODER, StoredWeights, hollow_model

__all__ = ["calibrate_layerwise"]

_FILE_OVERHEAD = 16 << 10
"""Bytes of a sample's files beside its states and positions: headers, and blocks that are not full."""


def calibrate_layerwise(
    source: Source,
    prompter: Prompter,
    samples: Samples,
    *,
    checkpoint_digest: str,
    folder: Path,
    report: Report = silent,
) -> Calibration:
    """What `calibrate` measures, on the model's own modules; they hold weights only while they run.

    Args:
        source: the checkpoint.
        prompter: of that checkpoint.
        samples: pictures and questions.
        checkpoint_digest: for the calibration.
        folder: takes the hidden states of all samples, [T, D] FP32 each, until the run ends, however it ends.
        report: progress.

    Raises:
        CapaError: the disk is too small, a tensor is missing, or the model yields NaN or infinity.
    """
    dims = source.dims.decoder
    lengths = [
        len(prompter.chat(sample.turns).input_ids)
        for sample in tracked(samples, "measure prompts", samples.count, report)
    ]
    per_token = 4 * dims.hidden_size * (1 + dims.deepstack_layers) + 32
    check_disk(folder, sum(length * per_token + _FILE_OVERHEAD for length in lengths))
    weights = StoredWeights(source)
    model = hollow_model(source, weights)
    with (
        TemporaryDirectory(dir=folder, prefix="activations-") as shelf,
        torch.no_grad(),
        measuring(model) as measurement,
    ):
        _look(model, weights, prompter, samples, Path(shelf), measurement, report)
        _decode(model, weights, samples.count, Path(shelf), measurement, report)
        return measurement.calibration(checkpoint_digest, samples.count)


def _look(
    model: Any,
    weights: StoredWeights,
    prompter: Prompter,
    samples: Samples,
    shelf: Path,
    measurement: Measurement,
    report: Report,
) -> None:
    """Put what every sample feeds the decoder on the shelf."""
    with weights.holding(model, "tower"):
        for index, sample in enumerate(tracked(samples, "look at pictures", samples.count, report)):
            prompt = prompter.chat(sample.turns)
            is_visual = torch.from_numpy(prompt.is_visual)
            embeds, *others = EagerInputs.of(weights.source.family.eager_inputs(model, prompt))[:3]
            measurement.add(is_visual, weights.damaged)
            _write(shelf / f"{index}.hidden", embeds)
            _write(shelf / f"{index}.others", [is_visual, *others])


def _decode(
    model: Any, weights: StoredWeights, count: int, shelf: Path, measurement: Measurement, report: Report
) -> None:
    """Take every sample through the decoder, all of them through one layer before the next."""
    text = model.model.language_model
    layers, norm = list(text.layers), text.norm
    text.norm = nn.Identity()
    for number, layer in enumerate(layers):
        # The model's own forward, for its masks, its rotary tables and what it does between layers.
        text.layers = nn.ModuleList(layer if other is layer else _Skipped() for other in layers)
        with weights.loaded(layer, f"{DECODER}layers.{number}."):
            for index in range(count):
                report("calibrate layer by layer", number * count + index, len(layers) * count)
                hidden = torch.load(shelf / f"{index}.hidden")
                is_visual, position_ids, deepstack = torch.load(shelf / f"{index}.others")
                inputs = EagerInputs(hidden, position_ids, _of_layer(deepstack, number))
                hidden = text(**inputs.arguments(is_visual), use_cache=False).last_hidden_state
                measurement.add(is_visual, weights.damaged)
                _write(shelf / f"{index}.hidden", hidden)
    with weights.loaded(norm, f"{DECODER}norm."):
        for index in range(count):
            norm(torch.load(shelf / f"{index}.hidden"))
            measurement.add(torch.empty(0, dtype=torch.bool), weights.damaged)
    report("calibrate layer by layer", len(layers) * count, len(layers) * count)


def _of_layer(deepstack: Sequence[Tensor], number: int) -> list[Tensor]:
    """What the model adds behind its layers, without what is not added behind this one."""
    if number >= len(deepstack):
        return []
    return [*(torch.zeros_like(features) for features in deepstack[:number]), deepstack[number]]


class _Skipped(nn.Module):
    """In the place of a decoder layer that is not the one at work."""

    def forward(self, hidden: Tensor, **_: object) -> Tensor:
        return hidden


def _write(path: Path, value: object) -> None:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    # torch's own writer turns a full disk into an error without a number.
    path.write_bytes(buffer.getbuffer())
