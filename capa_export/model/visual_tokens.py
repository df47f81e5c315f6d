"""Counts the visual tokens that a model makes of the picture that plans are made for."""

from typing import Any

from capa_export.base.dims import ModelDims
from capa_export.config.pixels import PROCESSOR_FILES, stored_settings
from capa_export.config.recipe import Recipe
from capa_export.model.checkpoint import fetch_json
from capa_export.model.families import LayoutFamily, load_family

__all__ = ["visual_tokens"]

_CONFIG = "config.json"


def visual_tokens(recipe: Recipe, checkpoint: str, dims: ModelDims[Any], *, revision: str | None = None) -> int:
    """Visual tokens of the recipe's picture, by the checkpoint's config and image processor; loads no torch.

    Args:
        recipe: whose picture it is, and between what it is resized.
        checkpoint: folder or hub id; where it has no image processor's files, transformers' defaults hold.
        dims: of the model.
        revision: of a hub id.

    Raises:
        CapaError: the model cannot keep the recipe's bounds, or a file does not parse.
    """
    family = load_family(recipe.family)
    files = fetch_json(checkpoint, (*PROCESSOR_FILES, _CONFIG), revision=revision)
    settings = stored_settings(
        family.picture_files(files.get(_CONFIG, {}), files) if isinstance(family, LayoutFamily) else files
    )
    family.check_bounds(settings, recipe.pictures, dims)
    return family.num_tokens(recipe.picture, settings, recipe.pictures, dims)
