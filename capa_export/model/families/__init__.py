"""The model families, a folder for each, and the protocols that they meet."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

import numpy as np

from capa_export.base.dims import ModelDims
from capa_export.base.errors import CapaError, ExitCode
from capa_export.config.pixels import PixelBounds

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

    from capa_export.model.checkpoint import Checkpoint
    from capa_export.model.eager_plan import EagerInputs
    from capa_export.model.prompt import Picture, Prompt, Video

__all__ = ["Family", "LayoutFamily", "SelectionFamily", "VideoFamily", "load_family", "require_selection"]


class Family(Protocol):
    """The names that a family's module defines; T = prompt tokens, D = hidden size."""

    ARCHITECTURE: str
    """The class in transformers, as `config.json` names it."""
    RENAMES: Sequence[tuple[str, str]]
    """(pattern of a stored tensor name's prefix, replacement), as transformers 4 and 5 save them."""
    UNUSED: Sequence[str]
    """Patterns of stored tensors that no graph reads."""
    IMAGE_OPTIONS: Mapping[str, Any]
    """Options for the image processor, beside the pictures."""

    def model_dims(self, config: Mapping[str, Any], *, where: str = "config.json") -> ModelDims[Any]:
        """The dimensions in `config.json`, or a CapaError that names the key."""
        ...

    def vision_model(self, dims: Any, dtype: "ir.DataType") -> "ir.Model":
        """The vision tower: pixel_values to image_features [N, D].

        Where the decoder has DeepStack layers, also to deepstack_features [layers, N, D].
        """
        ...

    def check_bounds(self, settings: Mapping[str, Any], bounds: PixelBounds, dims: ModelDims[Any]) -> None:
        """Refuse bounds that the image processor with these settings cannot keep."""
        ...

    def picture_options(
        self, size: tuple[int, int], settings: Mapping[str, Any], bounds: PixelBounds, dims: ModelDims[Any]
    ) -> Mapping[str, Any]:
        """Options for the image processor with these settings that keep a picture [width, height] within bounds."""
        ...

    def num_tokens(
        self, size: tuple[int, int], settings: Mapping[str, Any], bounds: PixelBounds, dims: ModelDims[Any]
    ) -> int:
        """Visual tokens that the image processor with these settings makes of a picture [width, height]."""
        ...

    def pictures(self, processed: Any, dims: ModelDims[Any]) -> "list[Picture]":
        """The image processor's output as inputs of the vision tower, one entry a picture."""
        ...

    def placeholder(self, tokenizer: Any, dims: ModelDims[Any]) -> str:
        """The text that the chat template writes where a picture stands."""
        ...

    def written(self, mark: str, picture: "Picture") -> str:
        """The text that the placeholder becomes for this picture."""
        ...

    def positions(self, is_visual: np.ndarray, shown: "Sequence[Picture]") -> tuple[np.ndarray, int]:
        """Position ids [axes, T], and the position of the first answer token."""
        ...

    def eager_inputs(self, model: Any, prompt: "Prompt") -> "EagerInputs | tuple[torch.Tensor, torch.Tensor]":
        """`EagerInputs`, or their first two, by the Hugging Face model's own methods alone."""
        ...


@runtime_checkable
class VideoFamily(Family, Protocol):
    """The additions of a family that takes videos."""

    def video_placeholder(self, tokenizer: Any, dims: ModelDims[Any]) -> str | None:
        """The text that the chat template writes where a video stands; None where the tokenizer has no token for it."""
        ...

    def video(
        self, video: "Video", image_processor: Any, folder: Path, bounds: PixelBounds, dims: ModelDims[Any]
    ) -> "Picture":
        """The video as an input of the vision tower, with the settings that the files in `folder` have for videos.

        Every frame stays within the bounds.
        """
        ...


@runtime_checkable
class SelectionFamily(Family, Protocol):
    """The additions of a family whose vision tower says which tokens matter to it; N = visual tokens."""

    def vision_model(self, dims: Any, dtype: "ir.DataType", *, selection: bool = False) -> "ir.Model":
        """The vision tower's graph; with `selection`, it also gives saliency [N] FP32 and tower_features [N, F]."""
        ...

    def eager_selection(self, model: Any, prompt: "Prompt") -> "tuple[torch.Tensor, torch.Tensor]":
        """Saliency [N] FP32 and tower features [N, F] of the prompt's pictures, by the Hugging Face tower itself."""
        ...


@runtime_checkable
class LayoutFamily(Family, Protocol):
    """The additions of a family whose authors publish it in a layout of their own."""

    def translated(self, checkpoint: "Checkpoint") -> "Checkpoint":
        """The checkpoint as transformers lays it out, weights in place; itself where it is laid out so."""
        ...

    def picture_files(self, config: Mapping[str, Any], files: Mapping[str, Any]) -> Mapping[str, Any]:
        """The files of the image processor, by name, that `translated` makes of these and of `config.json`."""
        ...


def load_family(name: str) -> Family:
    """The family's module.

    Raises:
        CapaError: there is none of that name.
    """
    known = sorted(module.name for module in iter_modules(__path__))
    if name not in known:
        raise CapaError(
            f"unknown family {name!r:.80} in the recipe; known families: {', '.join(known)}", ExitCode.USAGE
        )
    return cast("Family", import_module(f"{__name__}.{name}"))


def require_selection(family: Family, selector: str) -> SelectionFamily:
    """The family, for a selector that reads what its vision tower attends to.

    Raises:
        CapaError: its tower does not say.
    """
    if not isinstance(family, SelectionFamily):
        raise CapaError(
            f"selector {selector} needs the vision tower's attention, which {family.ARCHITECTURE} does not offer; "
            "choose another selector, or prune inside the decoder",
            ExitCode.USAGE,
        )
    return family
