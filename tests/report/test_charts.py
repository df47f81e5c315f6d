"""Positions on the charts: what is larger lies higher, and all lies within the panel."""

import math
from typing import Any

import pytest

from capa_export.report.charts import alpha, error_curves, linearity
from capa_export.report.schema import ExportError, LayerError
from tests.report.results import compared


def percent(text: str) -> float:
    assert text.endswith("%")
    return float(text[:-1])


def curves(*errors: float) -> dict[str, Any]:
    layers = tuple(
        LayerError(layer=index, relative_error=error, cosine=1, norm_ratio=1, noise=None)
        for index, error in enumerate(errors)
    )
    [chart] = error_curves([compared().model_copy(update={"layers": layers})])
    return chart


def test_errors_lie_on_a_log_scale() -> None:
    """1 lies at the top, 1e-4 at the bottom, and a decade is a quarter."""
    chart = curves(1.0, 1e-1, 1e-4, 0.0)
    assert [percent(point["error"]) for point in chart["points"]] == [0, 25, 100, 100]
    assert [percent(point["x"]) for point in chart["points"]] == [12.5, 37.5, 62.5, 87.5]
    assert chart["ticks"] == [
        ("1e-4", "100.00%"),
        ("1e-3", "75.00%"),
        ("1e-2", "50.00%"),
        ("1e-1", "25.00%"),
        ("1e0", "0.00%"),
    ]
    assert not chart["noisy"]


def test_what_is_no_number_breaks_the_line() -> None:
    assert [point["error"] for point in curves(1e-3, math.nan)["points"]][1] is None


def test_comparisons_share_one_scale_and_those_without_layers_have_no_chart() -> None:
    rows: list[ExportError] = [compared("a"), compared("b", layers=0), compared("c", layers=2)]
    charts = error_curves(rows)
    assert [chart["row"].artefact for chart in charts] == ["a", "c"]
    assert charts[0]["ticks"] == charts[1]["ticks"] and charts[0]["noisy"]
    assert error_curves([]) == []


@pytest.mark.parametrize(("layers", "labels"), [(1, 1), (14, 14), (15, 8), (80, 14)])
def test_labels_have_room(layers: int, labels: int) -> None:
    points = curves(*[1e-3] * layers)["points"]
    assert sum(point["label"] for point in points) == labels and points[0]["label"]


CALIBRATION: dict[str, Any] = {
    "eta": 0.9,
    "linear_layers": [1],
    "scaled_layers": [1],
    "paper_layers": [0, 1],
    "layers": [
        {
            "layer": layer,
            "cosine_visual": cosine,
            "cosine_text": 0.5,
            "relative_error": error,
            "alpha": {"p05": low, "median": 1.0, "p95": high},
        }
        for layer, (cosine, error, low, high) in enumerate([(0.6, 0.8, -9.0, 9.0), (0.95, 0.2, 0.5, 1.5)])
    ],
}


def test_linearity() -> None:
    chart = linearity(CALIBRATION)
    first, second = chart["points"]
    assert percent(second["visual"]) < percent(chart["eta"]) < percent(first["visual"]) < percent(first["text"]) < 100
    assert (first["linear"], second["linear"], first["paper"]) == (False, True, True)
    assert (percent(first["error"]), percent(second["error"]), chart["top_error"]) == (100, 25, 0.8)
    assert chart["ticks"][-1] == ("1.0", "0.00%")


def test_alpha_shows_the_layers_that_are_used() -> None:
    """Layer 0 is not used, so that its channels are cut off at the edges."""
    chart = alpha(CALIBRATION)
    first, second = chart["points"]
    assert (percent(first["p95"]), percent(first["p05"])) == (0, 100)
    assert 0 < percent(second["p95"]) < percent(chart["one"]) < percent(second["p05"]) < 100
    assert percent(second["median"]) == percent(chart["one"])
    # Which are used is not measured yet: the linear ones stand for them.
    assert alpha({**CALIBRATION, "scaled_layers": None}) == chart
    every = alpha({**CALIBRATION, "scaled_layers": []})
    assert 0 < percent(every["points"][0]["p95"]) < percent(every["points"][0]["p05"]) < 100
