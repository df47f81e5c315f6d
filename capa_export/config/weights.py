"""Where an engine finds its weights."""

from typing import Literal

__all__ = ["Weights", "WeightsWish"]

Weights = Literal["embedded", "joined", "external"]
"""In each engine; in one engine that is prefill and decode; or inputs of the networks, which engines share."""
WeightsWish = Literal["auto", "embedded", "joined", "external"]
