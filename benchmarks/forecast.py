"""Sets the forecast of `plan` beside figures that others have published: `python -m benchmarks.forecast`.

Writes docs/forecast.md. The published ones are of INT4 weights; here only the bytes and FLOPs of such a model are
forecast, with products in FP16 as they are computed there.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.random_checkpoint import CONFIGS
from benchmarks.selection.pages.words import table
from capa_export.base.weight_types import PackedLayers
from capa_export.config.target import load_target
from capa_export.model.families import load_family
from capa_export.plan.device_memory import decoder_bytes
from capa_export.plan.flops import flops, kv_cache, parameters
from capa_export.plan.forecast import AnswerWork, forecast

__all__ = ["PAGE", "page", "write_page"]

PAGE = Path(__file__).parents[1] / "docs" / "forecast.md"
_TEXT = 27
"""Of prompts of 292 tokens with one picture of 265."""


class Published(NamedTuple):
    """A line of TensorRT-Edge-LLM 0.9's table, JetPack 7.2, batch 1, INT4."""

    target: str
    device: str
    model: str
    visual: int
    prefill: float
    """Milliseconds, as the next."""
    vision: float | None
    tokens: float | None
    """A second; None where they are of speculative decoding."""


_PUBLISHED = (
    Published("orin", "Orin Nano 8GB", "Qwen3-VL-2B", 265, 191, 151, 36.9),
    Published("orin", "Orin NX 16GB", "Qwen3-VL-4B", 265, 245, 84, 31.2),
    Published("orin", "Orin NX 16GB", "Qwen3-VL-8B", 265, 462, 120, 18.9),
    Published("orin", "Orin NX 16GB", "Qwen2.5-VL-7B", 349, 536, 209, None),
    Published("orin", "AGX Orin 64GB", "Qwen3-VL-8B", 265, 225, 57, 32.3),
    Published("orin", "AGX Orin 64GB", "Qwen2.5-VL-7B", 349, 261, 89, None),
    Published("thor", "Jetson T5000", "Qwen3-VL-4B", 265, 85, 11.7, 79),
    Published("thor", "Jetson T5000", "Qwen3-VL-8B", 265, 157, 15.8, 48.9),
)


_MODELS = {
    "Qwen2.5-VL-7B": ("qwen25vl", CONFIGS["qwen25vl-7b"]),
    "Qwen3-VL-2B": ("qwen3vl", CONFIGS["qwen3vl-2b"]),
    "Qwen3-VL-4B": ("qwen3vl", CONFIGS["qwen3vl-4b"]),
    "Qwen3-VL-8B": ("qwen3vl", CONFIGS["qwen3vl-8b"]),
}
"""Name -> its family and its config."""


def _rows() -> Iterator[list[str]]:
    for one in _PUBLISHED:
        family, config = _MODELS[one.model]
        dims = load_family(family).model_dims(config)
        dims = replace(dims, decoder=replace(dims.decoder, packed=PackedLayers(kind="int4", group=128)))
        sizes: dict[str, Any] = {"num_visual": one.visual, "num_text": _TEXT, "schedule": ()}
        total = parameters(dims)
        work = AnswerWork(
            vision_flops=dims.vision.flops(one.visual),
            vision_bytes=2 * total.vision,
            prefill_flops=flops(dims.decoder, **sizes, linear_layers=()).dense.total,
            step_bytes=decoder_bytes(total, 2),
            cache_bytes=kv_cache(dims.decoder, **sizes).dense_bytes,
        )
        times = forecast(work, load_target(one.target).devices[one.device])
        if times is None:
            raise ValueError(f"{one.device} has no data sheet")
        yield [
            one.device,
            f"{one.model}, {one.visual + _TEXT} tokens",
            *_beside(one.prefill, times.prefill),
            *_beside(one.vision, times.vision),
            *_beside(one.tokens, 1000 / times.token),
        ]


def _beside(published: float | None, found: float) -> tuple[str, str]:
    if published is None:
        return "", f"{found:.3g}"
    return f"{published:.3g}", f"{found:.3g} ({found / published:.2f})"


def page() -> str:
    """The page."""
    said = ("prefill, ms", "vision, ms", "decode, tokens/s")
    header = ["device", "INT4 model", *(f"{name}{who}" for name in said for who in ("", ", forecast"))]
    return f"""# What the forecast is worth

`capa-export plan --target DEVICE` forecasts, for each board or card of a target, the milliseconds to the first token
and of each one behind it, dense and with CAPA. It counts the FLOPs and bytes of the model's graphs and divides them by
the device's bandwidth and FP16 throughput (`[devices]` in [engines/](../engines)), of which it takes 80 and 45 % to be
attained. A decode step is taken to move the cache 1.35 times, the most that was
[counted](../benchmarks/results/2026-11-30-cache-traffic.md). None of it was measured on a GPU by us.

The devices' figures were put in by hand. Held against what is published of them elsewhere were the throughput of Orin
Nano, AGX Orin 64GB, RTX 4090, RTX PRO 5000 72GB and RTX PRO 6000, and the bandwidth of Orin Nano 8GB, RTX 4090 and the
two RTX PRO; **the others were not checked**. A target of your own may say otherwise.

Beside it what NVIDIA publishes of TensorRT-Edge-LLM 0.9 (JetPack 7.2, batch 1, INT4 weights, products in FP16),
with the ratio of the forecast to it. The share that is attained was chosen by these very figures of Orin, so
they say how far such a rule reaches, not that it is right.

{table(header, _rows())}

- Orin is met within a factor of 1.4. Where Orin Nano and NX ran in their "super" modes, which the source does not
  say, the data sheet's figures are too low.
- Thor's prefill of so few tokens takes more than four times longer than its throughput would have it, and its vision
  tower nearly twice; why is not known here. For Thor take the forecast of both as a lower bound.
- Pruning and engines of our own are in none of these figures; what CAPA saves is counted, by the same rule.
"""


def write_page() -> None:
    """Write it."""
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    write_page()
    print(PAGE)
