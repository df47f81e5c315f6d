"""Forecasts how long devices take to answer, from counted FLOPs and bytes and what their data sheets promise.

It is no measurement. docs/forecast.md sets it beside what others have published.
"""

from dataclasses import asdict, dataclass
from typing import Any

from capa_export.base.dims import ModelDims
from capa_export.base.precision import FORMATS
from capa_export.config.target import Device, Target
from capa_export.plan.device_memory import decoder_bytes
from capa_export.plan.flops import KVCacheSize, PrefillFlops, parameters

__all__ = ["ANSWER", "AnswerTimes", "AnswerWork", "forecast", "forecasts"]

ANSWER = 64
"""Tokens of the answer whose last one is forecast."""
_ATTAINED_FLOPS = 0.45
"""Share of a device's throughput that matrix products attain: 43 to 62 % in published prefills on Orin, counted so."""
_ATTAINED_BANDWIDTH = 0.8
"""Share of a device's bandwidth that decode attains: 79 to 93 % in published figures of Orin and Thor, counted so."""
_CACHE_PASSES = 1.35
"""Times that a step moves the cache: it is read once, and scores are a third of it where eight query heads share one.

Counted from the layers of four models' engines by benchmarks/cache_traffic.py, 1.03 to 1.35."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerWork:
    """What one picture and an answer take, dense or pruned."""

    vision_flops: int
    vision_bytes: int
    """Of the tower's weights."""
    prefill_flops: int
    step_bytes: int
    """Of the weights that prefill and every step read."""
    cache_bytes: int
    """Of the prompt's keys and values."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerTimes:
    """Milliseconds of an answer."""

    vision: float
    prefill: float
    token: float
    """Of each token behind the first."""

    @property
    def milliseconds(self) -> dict[str, float]:
        """All of them, by name."""
        return {**asdict(self), "first": self.first, "last": self.last}

    @property
    def first(self) -> float:
        """From the picture's pixels to the first token."""
        return self.vision + self.prefill

    @property
    def last(self) -> float:
        """To the last token of an answer of `ANSWER`."""
        return self.first + (ANSWER - 1) * self.token


def forecast(work: AnswerWork, device: Device) -> AnswerTimes | None:
    """How long a device takes; None where its data sheet is not known.

    Each part takes as long as its matrix products or its bytes do, whichever is longer.
    """
    if device.bandwidth is None or device.tflops is None:
        return None
    flops_a_ms = _ATTAINED_FLOPS * device.tflops * 1e9
    bytes_a_ms = _ATTAINED_BANDWIDTH * device.bandwidth * 1e6
    return AnswerTimes(
        vision=max(work.vision_flops / flops_a_ms, work.vision_bytes / bytes_a_ms),
        prefill=max(work.prefill_flops / flops_a_ms, work.step_bytes / bytes_a_ms),
        token=(work.step_bytes + _CACHE_PASSES * work.cache_bytes) / bytes_a_ms,
    )


def forecasts(
    target: Target, dims: ModelDims[Any], precision: str, prefill: PrefillFlops, cache: KVCacheSize
) -> list[dict[str, Any]]:
    """Milliseconds by device, dense and pruned, of one picture; none in FP32, of which the data sheets say nothing.

    Args:
        target: its devices, those without a data sheet left out.
        dims: of the model.
        precision: of weights and activations.
        prefill: FLOPs of the prompt.
        cache: of the prompt.
    """
    total, width = parameters(dims), FORMATS[precision].num_bytes
    if width != 2:
        return []
    found: list[dict[str, Any]] = []
    for name, device in target.devices.items():
        times = {
            way: forecast(
                AnswerWork(
                    vision_flops=dims.vision.flops(prefill.num_visual),
                    vision_bytes=total.bytes_of_tower(width),
                    prefill_flops=flops.total,
                    step_bytes=decoder_bytes(total, width),
                    cache_bytes=held,
                ),
                device,
            )
            for way, flops, held in (
                ("dense", prefill.dense, cache.dense_bytes),
                ("capa", prefill.capa, cache.capa_bytes),
            )
        }
        if None not in times.values():
            found.append({"device": name, **{way: one.milliseconds for way, one in times.items() if one}})
    return found
