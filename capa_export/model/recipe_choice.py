"""Finds the shipped recipe that a checkpoint is for, by its `config.json`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from capa_export.base.errors import CapaError, ExitCode
from capa_export.base.toml import shipped_names
from capa_export.config.recipe import Recipe, load_recipe
from capa_export.model.checkpoint import fetch_config

__all__ = ["find_recipe"]

_DECODERS = ("text_config", "llm_config")
"""Keys of a config that may hold the decoder's."""


def find_recipe(checkpoint: str, revision: str | None = None) -> Recipe:
    """The recipe for the checkpoint at a local folder or under a hub id.

    Raises:
        CapaError: there is no checkpoint, or none that a recipe is for.
    """
    if not Path(checkpoint).expanduser().is_dir() and (checkpoint.endswith(".toml") or checkpoint in _names()):
        raise CapaError(f"{checkpoint}: is a recipe, not a checkpoint; say --model {checkpoint}", ExitCode.USAGE)
    config = fetch_config(checkpoint, revision=revision)
    model_type = config.get("model_type")
    recipes = [load_recipe(name) for name in _names()]
    # The decoder decides where a recipe says so; a decoder that none is for is refused by the model's own reader.
    for wanted in (f"{model_type}/{_decoder(config)}", model_type):
        for recipe in recipes:
            if wanted in recipe.model_types:
                return recipe
    for recipe in recipes:
        if model_type in [entry.split("/")[0] for entry in recipe.model_types]:
            return recipe
    known = sorted({entry.split("/")[0] for recipe in recipes for entry in recipe.model_types})
    what = "has no model_type" if model_type is None else f"model_type is {model_type!r:.80}"
    raise CapaError(
        f"{checkpoint}: config.json: {what}, and no recipe is for that; supported: {', '.join(known)}; "
        "a recipe of your own is given with --model"
    )


def _names() -> list[str]:
    return shipped_names("graphs")


def _decoder(config: Mapping[str, Any]) -> object:
    """The `model_type` of the decoder, where the config says it."""
    sections = (config.get(key) for key in _DECODERS)
    return next((section.get("model_type") for section in sections if isinstance(section, dict)), None)
