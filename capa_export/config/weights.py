"""Where an engine finds its weights."""

from typing import Literal

__all__ = ["Weights", "WeightsWish"]

Weights = Literal["embedded", "external"]
"""In the engine, or inputs of its network that engines share."""
WeightsWish = Literal["auto", "embedded", "external"]
