"""Qwen2.5-VL: tensor names, mRoPE, prompt format, and the eager model's inputs."""

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from capa_export.dims import ModelDims
from capa_export.families.qwen25vl.dims import Vision, model_dims
from capa_export.families.qwen25vl.vision import vision_model
from capa_export.prompt import Picture, Prompt

if TYPE_CHECKING:
    import torch

__all__ = [
    "ARCHITECTURE",
    "IMAGE_OPTIONS",
    "RENAMES",
    "UNUSED",
    "eager_inputs",
    "model_dims",
    "pictures",
    "placeholder",
    "positions",
    "vision_model",
    "written",
]

ARCHITECTURE = "Qwen2_5_VLForConditionalGeneration"

UNUSED: tuple[str, ...] = ()
IMAGE_OPTIONS: dict[str, bool] = {}
RENAMES = [
    (r"^(?:model\.)?visual\.", "visual."),
    (r"^model\.language_model\.", "model."),
    (r"^language_model\.model\.", "model."),
    (r"^language_model\.lm_head\.", "lm_head."),
]
"""Stored tensor names, as transformers 4 and 5 save them, to the names of the graph."""


def pictures(processed: Any, dims: ModelDims[Vision]) -> list[Picture]:
    """The image processor's flat patches, cut into one array a picture with its grid as the shape."""
    merge = dims.vision.spatial_merge_size
    flat = np.asarray(processed["pixel_values"], dtype=np.float32)
    result: list[Picture] = []
    start = 0
    for frames, rows, cols in np.asarray(processed["image_grid_thw"]).tolist():
        stop = start + frames * rows * cols
        shape = (frames, rows // merge, cols // merge, merge * merge, flat.shape[1])
        grid = (frames * rows // merge, cols // merge)
        result.append(Picture(flat[start:stop].reshape(shape), num_tokens=grid[0] * grid[1], grid=grid))
        start = stop
    return result


def placeholder(tokenizer: Any, dims: ModelDims[Vision]) -> str:
    """What the chat template writes where a picture stands."""
    return tokenizer.convert_ids_to_tokens(dims.image_token_id)


def written(mark: str, picture: Picture) -> str:
    """What the placeholder becomes: itself, once per visual token."""
    return mark * picture.num_tokens


def positions(is_visual: np.ndarray, shown: Sequence[Picture]) -> tuple[np.ndarray, int]:
    """mRoPE positions [3, T], and the position of the first answer token.

    A picture's tokens share one time step and count rows and columns from there; the text behind it goes on at
    the picture's longer side.
    """
    pending = list(shown)
    parts: list[np.ndarray] = []
    position = 0
    for visual, group in groupby(is_visual.tolist()):
        length = sum(1 for _ in group)
        if not visual:
            parts.append(np.broadcast_to(np.arange(length) + position, (3, length)))
            position += length
            continue
        while length:
            picture = pending.pop(0)
            frames, rows, cols = picture.patches.shape[:3]
            grid = np.stack(np.meshgrid(np.arange(frames), np.arange(rows), np.arange(cols), indexing="ij"))
            parts.append(grid.reshape(3, -1) + position)
            position += max(rows, cols)
            length -= picture.num_tokens
    return np.concatenate(parts, axis=1).astype(np.int64), position


def eager_inputs(model: Any, prompt: Prompt) -> "tuple[torch.Tensor, torch.Tensor]":
    """Input embeddings [1, T, D] and position ids [3, 1, T], by the model's own methods alone."""
    import torch

    inner = model.model
    input_ids = torch.from_numpy(prompt.input_ids)[None]
    embeds = inner.get_input_embeddings()(input_ids)
    if not prompt.pictures:
        return embeds, torch.arange(input_ids.shape[1]).expand(3, 1, -1)
    flat = [picture.patches.reshape(-1, picture.patches.shape[-1]) for picture in prompt.pictures]
    merge = model.config.vision_config.spatial_merge_size
    grid = torch.tensor(
        [[p.patches.shape[0], p.patches.shape[1] * merge, p.patches.shape[2] * merge] for p in prompt.pictures]
    )
    features = torch.cat(list(inner.get_image_features(torch.from_numpy(np.concatenate(flat)), grid).pooler_output))
    visual = input_ids == model.config.image_token_id
    embeds = embeds.masked_scatter(visual[..., None], features.to(embeds.dtype))
    position_ids, _ = inner.get_rope_index(input_ids, visual.int(), image_grid_thw=grid)
    return embeds, position_ids
