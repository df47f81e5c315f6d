"""LLaVA-1.5 sees every picture at one size."""

from collections.abc import Mapping
from typing import Any

from capa_export.base.dims import ModelDims
from capa_export.config.pixels import PixelBounds
from capa_export.model.families.llava15.dims import VisionDims

__all__ = ["check_bounds", "num_tokens", "picture_options"]


def check_bounds(_settings: Mapping[str, Any], bounds: PixelBounds, dims: ModelDims[VisionDims]) -> None:
    """Refuse all bounds of the area.

    Raises:
        CapaError: there are some.
    """
    side = dims.vision.image_size
    bounds.refuse(f"this model sees every picture at {side} x {side} pixels; drop the option")


def picture_options(
    _size: tuple[int, int], _settings: Mapping[str, Any], _bounds: PixelBounds, _dims: ModelDims[VisionDims]
) -> dict[str, Any]:
    """Nothing that the image processor needs to be told."""
    return {}


def num_tokens(
    _size: tuple[int, int], _settings: Mapping[str, Any], _bounds: PixelBounds, dims: ModelDims[VisionDims]
) -> int:
    """Visual tokens of any picture."""
    return dims.vision.num_tokens
