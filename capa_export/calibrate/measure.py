"""Measures the dense eager model on pictures: linearity of visual FFNs, alpha, sinks, activation ranges.

T = prompt tokens, V = visual tokens, D = hidden size, L = decoder layers; H = query heads, G = KV heads, d = head size.
"""

from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from math import isfinite, isnan
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from capa_export.base.errors import NotFiniteError
from capa_export.base.progress import Report, silent, tracked
from capa_export.calibrate.sums import SINK_THRESHOLD, Calibration, LayerSums, summed
from capa_export.calibrate.unfinished import UnfinishedSums
from capa_export.config.parts import ATTENTION, address_of, in_tower
from capa_export.data.samples import Sample, Samples
from capa_export.model.eager_plan import EagerInputs
from capa_export.model.families import Family
from capa_export.model.prompt import Prompter
from capa_export.model.threads import worthwhile_threads

__all__ = ["Measurement", "calibrate", "measure", "measuring", "watching_ffns"]

_SDPA = "sdpa"
"""Name of the attention function that models are loaded with."""
_TILE = 1 << 20
"""Most attention scores in memory at a time."""


def calibrate(
    model: Any,
    family: Family,
    prompter: Prompter,
    samples: Samples,
    *,
    checkpoint_digest: str,
    unfinished: UnfinishedSums | None = None,
    report: Report = silent,
) -> Calibration:
    """Stream the samples through the dense model and keep sums only.

    Args:
        model: the eager model in FP32.
        family: the model's family.
        prompter: the checkpoint's prompter.
        samples: pictures and questions.
        checkpoint_digest: digest of the weights, to store in the calibration.
        unfinished: store of the sums, from which an interrupted run goes on.
        report: told the progress.

    Raises:
        NotFiniteError: the model yields NaN or infinity.
        CapaError: the sums cannot be kept.
    """
    before = unfinished and unfinished.load()
    done = before.samples if before else 0
    rest = tracked(islice(samples, done, None), "calibrate", samples.count - done, report)
    parts = (measure(model, family, prompter, sample, checkpoint_digest) for sample in rest)
    return summed(parts, before, unfinished and unfinished.keep)


def measure(model: Any, family: Family, prompter: Prompter, sample: Sample, checkpoint_digest: str) -> Calibration:
    """Measure one sample. Summed in the order of samples, the total has the same bits wherever each was measured.

    x is the residual stream before the post-attention norm and y = x + FFN(norm(x)) (CAPA, section 4.2).

    Raises:
        NotFiniteError: the model yields NaN or infinity.
    """
    text = model.model.language_model

    def damaged() -> str | None:
        return next((name for name, tensor in model.named_parameters() if not tensor.isfinite().all()), None)

    prompt = prompter.chat(sample.turns)
    is_visual = torch.from_numpy(prompt.is_visual)
    with measuring(model) as measurement:
        with torch.no_grad(), worthwhile_threads(model):
            inputs = EagerInputs.of(family.eager_inputs(model, prompt))
            text(**inputs.arguments(is_visual), use_cache=False)
        measurement.add(is_visual, damaged)
    return measurement.calibration(checkpoint_digest, 1)


@dataclass
class Measurement:
    """The sums and largest magnitudes that the hooks of `measuring` collect."""

    sums: list[LayerSums]
    absmax: dict[str, float] = field(default_factory=dict)
    """Largest magnitudes by module path, as in `Calibration`."""
    seen: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Layer -> (x, x + FFN(norm(x))), each [T, D] FP32, of the latest forward."""

    def add(self, is_visual: Tensor, damaged: Callable[[], str | None]) -> None:
        """Add the layers that ran since the last call to their sums, and forget their states.

        Args:
            is_visual: [T] bool.
            damaged: finds the name of a tensor that is not finite, for the error message.

        Raises:
            NotFiniteError: a block's output is not finite.
        """
        if broken := [name for name, largest in self.absmax.items() if not isfinite(largest)]:
            raise NotFiniteError(_why_not_finite(damaged(), broken[0]))
        for layer, (x_TD, y_TD) in self.seen.items():
            _add(self.sums[layer], x_TD, y_TD, is_visual)
        self.seen.clear()

    def calibration(self, checkpoint_digest: str, samples: int) -> Calibration:
        """All sums so far, as a calibration."""
        return Calibration(checkpoint_digest, samples, self.sums, dict(sorted(self.absmax.items())))


@contextmanager
def measuring(model: Any) -> Generator[Measurement]:
    """Watch every forward of the model's blocks, in whatever order and number they run."""
    text = model.model.language_model
    measurement = Measurement([LayerSums.zeros(text.config.hidden_size) for _ in text.layers])
    with _watch_ranges(model, measurement.absmax), watching_ffns(text.layers, measurement.seen):
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
def watching_ffns(layers: Any, seen: dict[int, tuple[Tensor, Tensor]]) -> Generator[None]:
    """Record (x, x + FFN(norm(x))) of each layer in every forward of the block."""
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
    """Record largest magnitudes by module path in every forward of the block: see `Calibration.absmax`."""

    def note(name: str, *extremes: Tensor) -> None:
        largest = float(torch.stack(extremes).abs().max())
        # max() would drop a NaN.
        absmax[name] = largest if isnan(largest) else max(absmax.get(name, 0.0), largest)

    def output_of(name: str) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            note(name, *torch.aminmax(output[0] if isinstance(output, tuple) else output))

        return hook

    def input_of(name: str) -> Any:
        def hook(_module: Any, inputs: tuple[Tensor, ...]) -> None:
            note(f"{name}.input", *torch.aminmax(inputs[0]))

        return hook

    handles: list[Any] = []
    attentions: dict[nn.Module, str] = {}
    for name, module in _watched(model):
        handles.append(module.register_forward_hook(output_of(name)))
        if _is_leaf(module):
            handles.append(module.register_forward_pre_hook(input_of(name)))
        if name.endswith(ATTENTION):
            attentions[module] = name

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Any:
        if name := attentions.get(module):
            for part, values in (("query", query), ("key", key), ("value", value)):
                note(f"{name}.{part}", *torch.aminmax(values))
            note(f"{name}.scores", _largest_product(query[0], key[0]) * options["scaling"])
        return plain(module, query, key, value, *args, **options)

    interface = AttentionInterface()
    plain = interface[_SDPA]
    interface.register(_SDPA, attend)
    try:
        yield
    finally:
        interface.register(_SDPA, plain)
        for handle in handles:
            handle.remove()


def _watched(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """Blocks, attentions and FFNs; norms and projections in them and behind them, but for those of attentions."""
    begun: set[bool] = set()
    for name, module in model.named_modules():
        tower, address = in_tower(name), address_of(name)
        path = "" if address is None else address.path
        if address is not None:
            begun.add(tower)
        projected = _is_leaf(module) and not path.startswith(ATTENTION) and not name.startswith("lm_head")
        if tower in begun and (projected or (address is not None and path in ("", "mlp", *ATTENTION))):
            yield name, module


def _is_leaf(module: nn.Module) -> bool:
    return not any(True for _ in module.children()) and any(True for _ in module.parameters())


def _largest_product(query_HTd: Tensor, key_GLd: Tensor) -> Tensor:
    """The largest |q k|, in bounded memory.

    No product is larger than the two lengths multiplied, so that the longest queries are tried first and most others
    need no trying.
    """
    heads, groups, length = len(query_HTd), len(key_GLd), key_GLd.shape[1]
    query_GRd = query_HTd.reshape(groups, -1, query_HTd.shape[-1])
    if heads * query_HTd.shape[1] * length <= _TILE:
        return torch.stack(torch.aminmax(query_GRd @ key_GLd.mT)).abs().max()
    largest = query_HTd.new_zeros(())
    for query_Rd, key_Ld in zip(query_GRd, key_GLd, strict=True):
        bound_R = torch.linalg.vector_norm(query_Rd, dim=-1) * torch.linalg.vector_norm(key_Ld, dim=-1).max()
        bound_R, order_R = bound_R.sort(descending=True)
        for rows, bounds in zip(
            order_R.split(max(1, _TILE // length)), bound_R.split(max(1, _TILE // length)), strict=True
        ):
            if bounds[0] <= largest:
                break
            largest = torch.maximum(largest, torch.stack(torch.aminmax(query_Rd[rows] @ key_Ld.T)).abs().max())
    return largest
