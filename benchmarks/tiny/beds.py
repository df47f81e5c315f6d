"""The test beds by name, and the protocol that they meet."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from capa_export.model.families import Family, load_family

__all__ = ["BEDS", "CELLS", "NUM_VISUAL", "Bed", "family_of", "load_bed", "normalized"]

BEDS = ("tiny-qwen25vl", "tiny-llava15", "tiny-internvl3")
CELLS = 8
NUM_VISUAL = CELLS * CELLS
"""Visual tokens of a picture, one for each cell."""


class Bed(Protocol):
    """The names that a test bed's module defines. B = pictures, H = decoder width."""

    FAMILY: str
    STANDS_FOR: Mapping[str, str]
    """Tokens of this vocabulary alone, to those of `tiny-qwen25vl` that have their role."""

    def build_tokenizer(self) -> PreTrainedTokenizerFast:
        """Build the tokenizer, with the family's special tokens and chat template."""
        ...

    def build_image_processor(self) -> Any:
        """The family's, for pictures of 224 x 224 pixels."""
        ...

    def build_model(self, tokenizer: PreTrainedTokenizerFast, *, seed: int = 0) -> Any:
        """A freshly initialised Hugging Face model."""
        ...

    def pixels_from_pictures(self, pictures_BHWC: NDArray[np.uint8]) -> Tensor:
        """Pixels that the image processor makes of 224 x 224 pictures, for a batch at once."""
        ...

    def visual_tokens(self, model: Any, pixels: Tensor) -> Tensor:
        """The vision tower and projector on a batch: [B, 64, H], row by row."""
        ...


def load_bed(name: str) -> Bed:
    """The module of a test bed in `BEDS`."""
    return cast("Bed", import_module(f"benchmarks.tiny.{name.replace('-', '_')}"))


def family_of(bed: Bed) -> Family:
    """The family whose real models the bed stands for."""
    return load_family(bed.FAMILY)


def normalized(pictures_BHWC: NDArray[np.uint8], processor: Any) -> NDArray[np.float32]:
    """Pixel values with the image processor's mean and deviation taken out."""
    mean, std = (np.array(v, dtype=np.float32) for v in (processor.image_mean, processor.image_std))
    return np.asarray((pictures_BHWC.astype(np.float32) / 255 - mean) / std, dtype=np.float32)
