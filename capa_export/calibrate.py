"""Runs the dense eager model over pictures: where visual FFNs are linear, alpha, sinks, activation ranges.

T = prompt tokens, V = visual tokens, D = hidden size, L = decoder layers.
"""

import re
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isfinite, isnan
from typing import Any

import torch
from torch import Tensor

from capa_export.calibration import SINK_THRESHOLD, Calibration, LayerSums
from capa_export.eager import EagerInputs
from capa_export.errors import CapaError
from capa_export.families import Family
from capa_export.progress import Report, silent, tracked
from capa_export.prompt import Prompter
from capa_export.samples import Samples

__all__ = ["Measurement", "calibrate", "measuring"]

_BLOCK = re.compile(r"(?:layers?|blocks)\.\d+(?:\.(?:self_attn|attn|attention|mlp))?$")


def calibrate(
    model: Any, family: Family, prompter: Prompter, samples: Samples, *, checkpoint_digest: str, report: Report = silent
) -> Calibration:
    """Stream the samples through the dense model and keep sums only.

    x is the residual stream before the post-attention norm and y = x + FFN(norm(x)) (CAPA, section 4.2).

    Raises:
        CapaError: the model yields NaN or infinity.
    """
    text = model.model.language_model

    def damaged() -> str | None:
        return next((name for name, tensor in model.named_parameters() if not tensor.isfinite().all()), None)

    with measuring(model) as measurement:
        for sample in tracked(samples, "calibrate", samples.count, report):
            prompt = prompter.chat(sample.turns)
            is_visual = torch.from_numpy(prompt.is_visual)
            with torch.no_grad():
                inputs = EagerInputs.of(family.eager_inputs(model, prompt))
                text(**inputs.arguments(is_visual), use_cache=False)
            measurement.add(is_visual, damaged)
    return measurement.calibration(checkpoint_digest, samples.count)


@dataclass
class Measurement:
    """What the hooks of `measuring` saw."""

    sums: list[LayerSums]
    absmax: dict[str, float] = field(default_factory=dict)
    """Largest magnitude of every block's, attention's and FFN's output, by module path."""
    seen: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Layer -> (x, x + FFN(norm(x))), each [T, D] FP32, of the latest forward."""

    def add(self, is_visual: Tensor, damaged: Callable[[], str | None]) -> None:
        """Add the layers that ran since the last call to their sums, and forget their states.

        Args:
            is_visual: [T] bool.
            damaged: finds the name of a tensor that is not finite, for the error's sake.

        Raises:
            CapaError: a block's output is not finite.
        """
        if broken := [name for name, largest in self.absmax.items() if not isfinite(largest)]:
            raise CapaError(_why_not_finite(damaged(), broken[0]))
        for layer, (x_TD, y_TD) in self.seen.items():
            _add(self.sums[layer], x_TD, y_TD, is_visual)
        self.seen.clear()

    def calibration(self, checkpoint_digest: str, samples: int) -> Calibration:
        """All that was measured."""
        return Calibration(checkpoint_digest, samples, self.sums, dict(sorted(self.absmax.items())))


@contextmanager
def measuring(model: Any) -> Generator[Measurement]:
    """Watch every forward of the model's blocks, in whatever order and number they run."""
    text = model.model.language_model
    measurement = Measurement([LayerSums.zeros(text.config.hidden_size) for _ in text.layers])
    with _watch_ranges(model, measurement.absmax), _watch_ffns(text.layers, measurement.seen):
        yield measurement


def _why_not_finite(tensor: str | None, block: str) -> str:
    if tensor is None:
        return f"the output of {block} is not finite, even in FP32: the checkpoint does not work as it is"
    return f"tensor {tensor} holds NaN or infinity; download the checkpoint again"


def _add(sums: LayerSums, x_TD: Tensor, y_TD: Tensor, is_visual: Tensor) -> None:
    """Add one prompt to a layer's sums; products of FP32 numbers are exact in FP64."""
    cosine = torch.nn.functional.cosine_similarity(x_TD, y_TD, dim=-1).double()
    x, y = x_TD[is_visual].double(), y_TD[is_visual].double()
    sums.xx += (x * x).sum(0).numpy()
    sums.xy += (x * y).sum(0).numpy()
    sums.yy += (y * y).sum(0).numpy()
    sums.visual_tokens += len(x)
    sums.visual_cosine += float(cosine[is_visual].sum())
    sums.text_tokens += int((~is_visual).sum())
    sums.text_cosine += float(cosine[~is_visual].sum())
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    token, channel = (normed.abs() > SINK_THRESHOLD).nonzero(as_tuple=True)
    groups: dict[int, list[int]] = {}
    for index, dim in zip(token.tolist(), channel.tolist(), strict=True):
        groups.setdefault(index, []).append(dim)
    sums.sinks += Counter(tuple(dims) for dims in groups.values())


@contextmanager
def _watch_ffns(layers: Any, seen: dict[int, tuple[Tensor, Tensor]]) -> Generator[None]:
    """Layer -> (x, x + FFN(norm(x)))."""
    entering: dict[int, Tensor] = {}
    handles = []
    for index, layer in enumerate(layers):

        def before(_module: Any, inputs: tuple[Tensor, ...], index: int = index) -> None:
            entering[index] = inputs[0][0].float()

        def after(_module: Any, _inputs: Any, output: Tensor, index: int = index) -> None:
            seen[index] = (entering[index], entering[index] + output[0].float())

        handles += [
            layer.post_attention_layernorm.register_forward_pre_hook(before),
            layer.mlp.register_forward_hook(after),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _watch_ranges(model: Any, absmax: dict[str, float]) -> Generator[None]:
    """Module path -> largest magnitude of its output."""

    def watch(name: str) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            values = output[0] if isinstance(output, tuple) else output
            largest = float(values.abs().max())
            # max() would drop a NaN.
            absmax[name] = largest if isnan(largest) else max(absmax.get(name, 0.0), largest)

        return hook

    handles = [
        module.register_forward_hook(watch(name)) for name, module in model.named_modules() if _BLOCK.search(name)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
