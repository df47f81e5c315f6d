"""Positions of points, labels and ticks on the report's charts, in per cent of their panels."""

from collections.abc import Mapping, Sequence
from math import ceil, floor, log10
from typing import Any

from capa_export.report.schema import ExportError, LayerError

__all__ = ["alpha", "error_curves", "linearity"]

_MOST_LABELS = 14


def error_curves(rows: Sequence[ExportError]) -> list[dict[str, Any]]:
    """Curves of the hidden states' relative error per layer, a chart per comparison that has it, on one log scale.

    A figure that is not finite lies on the upper edge and breaks the line; 0 lies on the lower one.
    """
    rows = [row for row in rows if row.layers]
    found = [value for row in rows for layer in row.layers for value in (layer.relative_error, layer.noise)]
    positive = [value for value in found if value]
    low, high = (floor(log10(min(positive))), ceil(log10(max(positive)))) if positive else (-8, -6)
    high = max(high, low + 1)

    def height(value: float) -> float:
        return 100 * (high - log10(value)) / (high - low) if value else 100.0

    def point(index: int, layer: LayerError, count: int) -> dict[str, Any]:
        error, noise = layer.relative_error, layer.noise
        return {
            "layer": layer.layer,
            "x": _middle(index, count),
            "error": None if error is None else f"{height(error):.2f}%",
            "noise": f"{height(noise):.2f}%" if noise else None,
            "label": _labelled(index, count),
        }

    every = ceil((high - low) / 4)
    ticks = [(f"1e{exponent}", f"{height(10.0**exponent):.2f}%") for exponent in range(low, high + 1, every)]
    return [
        {
            "row": row,
            "points": [point(index, layer, len(row.layers)) for index, layer in enumerate(row.layers)],
            "ticks": ticks,
            "noisy": any(layer.noise for layer in row.layers),
        }
        for row in rows
    ]


def linearity(calibration: Mapping[str, Any]) -> dict[str, Any]:
    """The chart of each FFN's cosines and error, with the layers that are linear."""
    layers, eta = calibration["layers"], calibration["eta"]
    lowest = min([eta, *(layer[key] for layer in layers for key in ("cosine_visual", "cosine_text"))])
    # Room below the lowest point, down to a tenth, so that the axis has round labels.
    bottom = floor((lowest - 0.02) * 10) / 10
    top_error = max(layer["relative_error"] for layer in layers) or 1.0
    ticks = range(round(bottom * 10), 11, max(1, ceil((10 - round(bottom * 10)) / 5)))

    def height(cosine: float) -> str:
        return f"{100 * (1 - cosine) / (1 - bottom):.2f}%"

    points = [
        {
            "layer": layer["layer"],
            "x": _middle(index, len(layers)),
            "visual": height(layer["cosine_visual"]),
            "text": height(layer["cosine_text"]),
            "error": f"{100 * layer['relative_error'] / top_error:.2f}%",
            "left": f"{100 * (index + 0.2) / len(layers):.2f}%",
            "linear": layer["layer"] in calibration["linear_layers"],
            "paper": layer["layer"] in calibration["paper_layers"],
            "label": _labelled(index, len(layers)),
        }
        for index, layer in enumerate(layers)
    ]
    return {
        "points": points,
        "bar": f"{60 / len(layers):.2f}%",
        "eta": height(eta),
        "top_error": top_error,
        "ticks": [(f"{tick / 10:.1f}", height(tick / 10)) for tick in ticks],
    }


def alpha(calibration: Mapping[str, Any]) -> dict[str, Any]:
    """The chart of alpha's spread over the channels of each layer.

    The axis holds 90 % of the channels of every layer in which alpha is used, and 1; what lies beyond is cut off.
    """
    layers, linear = calibration["layers"], calibration["scaled_layers"]
    if linear is None:
        linear = calibration["linear_layers"]
    used = [layer["alpha"] for layer in layers if layer["layer"] in linear or not linear]
    low = min([1.0, *(spread["p05"] for spread in used)])
    high = max([1.0, *(spread["p95"] for spread in used)])
    step = _step(max(high - low, 1e-3) / 4)
    low, high = floor(low / step - 0.25) * step, ceil(high / step + 0.25) * step

    def height(value: float) -> str:
        return f"{100 * (high - min(max(value, low), high)) / (high - low):.2f}%"

    digits = max(0, -floor(log10(step)))
    values = [low + index * step for index in range(round((high - low) / step) + 1)]
    return {
        "points": [
            {
                "layer": layer["layer"],
                "x": _middle(index, len(layers)),
                "linear": layer["layer"] in linear,
                "label": _labelled(index, len(layers)),
                **{name: height(value) for name, value in layer["alpha"].items()},
            }
            for index, layer in enumerate(layers)
        ],
        "one": height(1.0),
        "ticks": [(f"{value:.{digits}f}", height(value)) for value in values],
    }


def _step(rough: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that is not below `rough`."""
    power = 10.0 ** floor(log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))


def _middle(index: int, count: int) -> str:
    return f"{100 * (index + 0.5) / count:.2f}%"


def _labelled(index: int, count: int) -> bool:
    """Whether the layer's number is written under it."""
    return index % ceil(count / _MOST_LABELS) == 0
