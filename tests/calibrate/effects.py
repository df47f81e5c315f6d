"""A calibration whose scales are said to change nothing, where a test needs no model."""

from dataclasses import replace

from capa_export.calibrate.scaled_sets import FfnEffect, ScaledSet
from capa_export.calibrate.sums import Calibration
from capa_export.config.recipe import FFN


def harmless(calibration: Calibration, ffn: FFN) -> Calibration:
    """The calibration, with the effect that takes every linear layer."""
    every = ScaledSet(layers=calibration.linear_layers(ffn.eta), kl=0.0, agreement=1.0)
    effect = FfnEffect(
        calibration=calibration.digest(),
        eta=ffn.eta,
        budget=ffn.budget,
        schedule="capa@2:0.75",
        samples=1,
        tried=(every,) if every.layers else (),
    )
    return replace(calibration, effect=effect)
