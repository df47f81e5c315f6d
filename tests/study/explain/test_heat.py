"""Colours that rise with the amount."""

import numpy as np
import pytest
from PIL import Image

from capa_export.study.explain.heat import ColorScale, heat, legend, mark_sinks


def brightness(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("L")).astype(float)


def test_more_is_brighter_for_every_eye() -> None:
    assert (np.diff(brightness(legend())[0]) >= 0).all()
    assert np.ptp(brightness(legend())) > 150


def test_every_cell_has_its_own_colour() -> None:
    shown = brightness(heat(Image.new("RGB", (60, 40), "grey"), 2, 3, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]))
    assert shown.shape == (256, 384)
    cells = shown[64::128, 64::128].ravel()
    assert (np.diff(cells) > 10).all()


def test_scales_are_logarithmic_and_bear_what_has_no_logarithm() -> None:
    scale = ColorScale.of([0.01, 1.0, 0.0, None, 0.1])
    assert (scale.low, scale.middle, scale.high) == (0.01, pytest.approx(0.1), 1.0)
    shares = [scale.share(value) for value in (None, 0.0, 0.01, 0.1, 1.0)]
    assert shares == pytest.approx([0, 0, 0, 0.5, 1])
    for flat in ([], [0.0, None], [3.0, 3.0]):
        assert ColorScale.of(flat).share(3.0) == 0.0


def test_dumps_are_crossed_and_anchors_ringed() -> None:
    shown = np.asarray(mark_sinks(Image.new("RGB", (40, 20), "black"), 1, 2, {0}, {1})).astype(int)
    colour = shown.max(-1) - shown.min(-1)
    assert colour[96, 96] > 60, "a cross has a middle"
    assert colour[96, 288] == 0, "a ring has none"
    assert colour[:, 192:].max() > 60
