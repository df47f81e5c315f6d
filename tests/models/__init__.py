"""A small random model of each family, of the real classes."""

from typing import Any

from tests.models import internvl3, llava15, qwen3vl, qwen25vl

__all__ = ["FAMILIES"]

FAMILIES: dict[str, Any] = {"qwen25vl": qwen25vl, "internvl3": internvl3, "llava15": llava15, "qwen3vl": qwen3vl}
"""Modules with `random_model` and `save_model`, by the name of the family."""
