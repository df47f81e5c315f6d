"""What a bundle alone says of its model."""

import json
from typing import Any

from capa_export.bundle import Bundle
from capa_export.dims import ModelDims
from capa_export.families import load_family
from capa_export.job import ONNX
from capa_export.prompt import Prompter
from capa_export.recipe import recipe_of

__all__ = ["bundled_dims", "bundled_prompter"]


def bundled_dims(bundle: Bundle) -> ModelDims[Any]:
    """The dimensions."""
    path = bundle.folder / ONNX / "llm" / "config.json"
    family = load_family(recipe_of(bundle.manifest, bundle.folder).family)
    return family.model_dims(json.loads(path.read_text(encoding="utf-8")), where=str(path))


def bundled_prompter(bundle: Bundle) -> Prompter:
    """Its tokenizer, chat template and image processor.

    Raises:
        CapaError: a file is missing, or does not load.
    """
    folder = bundle.folder / ONNX
    family = load_family(recipe_of(bundle.manifest, bundle.folder).family)
    return Prompter(folder / "llm", folder / "visual", family, bundled_dims(bundle))
