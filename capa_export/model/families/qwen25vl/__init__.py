"""Qwen2.5-VL: tensor names, mRoPE, prompt format, and the eager model's inputs."""

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from capa_export.base.dims import ModelDims
from capa_export.base.errors import CapaError
from capa_export.model.eager_attention import attention_weights
from capa_export.model.families.qwen25vl.dims import VisionDims, last_full_block, model_dims
from capa_export.model.families.qwen25vl.pixels import check_bounds, num_tokens, picture_options
from capa_export.model.families.qwen25vl.video import video
from capa_export.model.prompt import Picture, Prompt

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

__all__ = [
    "ARCHITECTURE",
    "IMAGE_OPTIONS",
    "RENAMES",
    "UNUSED",
    "check_bounds",
    "eager_inputs",
    "eager_selection",
    "model_dims",
    "num_tokens",
    "picture_options",
    "pictures",
    "placeholder",
    "positions",
    "tower_inputs",
    "video",
    "video_placeholder",
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


def vision_model(dims: VisionDims, dtype: "ir.DataType", *, selection: bool = False) -> "ir.Model":
    """The graph of the vision tower; who runs one does not wait for the imports that make one."""
    from capa_export.model.families.qwen25vl import vision

    return vision.vision_model(dims, dtype, selection=selection)


def pictures(processed: Any, dims: ModelDims[VisionDims]) -> list[Picture]:
    """The image processor's flat patches, cut into one array a picture with its grid as the shape."""
    merge = dims.vision.spatial_merge_size
    flat = np.asarray(processed["pixel_values"], dtype=np.float32)
    if flat.shape[1] != dims.vision.patch_values:
        raise CapaError(
            f"preprocessor_config.json makes patches of {flat.shape[1]} numbers, config.json implies "
            f"{dims.vision.patch_values}; use the two files that were published together"
        )
    result: list[Picture] = []
    start = 0
    for frames, rows, cols in np.asarray(processed["image_grid_thw"]).tolist():
        stop = start + frames * rows * cols
        shape = (frames, rows // merge, cols // merge, merge * merge, flat.shape[1])
        grid = (frames * rows // merge, cols // merge)
        result.append(Picture(flat[start:stop].reshape(shape), num_tokens=grid[0] * grid[1], grid=grid))
        start = stop
    return result


def placeholder(tokenizer: Any, dims: ModelDims[VisionDims]) -> str:
    """The text that the chat template writes where a picture stands."""
    return tokenizer.convert_ids_to_tokens(dims.image_token_id)


def video_placeholder(tokenizer: Any, dims: ModelDims[VisionDims]) -> str | None:
    """The text that the chat template writes where a video stands; None where the tokenizer has no token for it."""
    return tokenizer.convert_ids_to_tokens(dims.vision.video_token_id)


def written(mark: str, picture: Picture) -> str:
    """The placeholder once per visual token."""
    return mark * picture.num_tokens


def positions(is_visual: np.ndarray, shown: Sequence[Picture]) -> tuple[np.ndarray, int]:
    """mRoPE positions [3, T], and the position of the first answer token.

    A picture's tokens share one time step and count rows and columns from there; a video's frames also count time.
    The text behind either goes on at its longer side, which a long video's time may be past.
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
            # FP32 as in transformers: the whole part of a product near a whole number depends on it.
            time = (np.arange(frames, dtype=np.float32) * np.float32(picture.frame_positions)).astype(np.int64)
            grid = np.stack(np.meshgrid(time, np.arange(rows), np.arange(cols), indexing="ij"))
            parts.append(grid.reshape(3, -1) + position)
            position += max(rows, cols)
            length -= picture.num_tokens
    position_ids = np.concatenate(parts, axis=1).astype(np.int64)
    return position_ids, int(position_ids.max()) + 1


def tower_inputs(model: Any, shown: Sequence[Picture]) -> "tuple[torch.Tensor, torch.Tensor]":
    """The Hugging Face tower's patches [N, values], and the grid [pictures, 3] that they lie on."""
    import torch

    merge = model.config.vision_config.spatial_merge_size
    flat = [picture.patches.reshape(-1, picture.patches.shape[-1]) for picture in shown]
    grid = [[p.patches.shape[0], p.patches.shape[1] * merge, p.patches.shape[2] * merge] for p in shown]
    return torch.from_numpy(np.concatenate(flat)), torch.tensor(grid)


def eager_inputs(model: Any, prompt: Prompt) -> "tuple[torch.Tensor, torch.Tensor]":
    """Input embeddings [1, T, D] and position ids [3, 1, T], by the model's own methods alone."""
    import torch

    inner = model.model
    input_ids = torch.from_numpy(prompt.input_ids)[None]
    embeds = inner.get_input_embeddings()(input_ids)
    if not prompt.pictures:
        return embeds, torch.arange(input_ids.shape[1]).expand(3, 1, -1)
    kinds = torch.zeros_like(input_ids, dtype=torch.int)
    grids: dict[str, torch.Tensor] = {}
    seconds = [picture.frame_seconds for picture in prompt.pictures if picture.frame_seconds is not None]
    for kind, modality in enumerate(("image", "video"), 1):
        shown = [picture for picture in prompt.pictures if (picture.frame_seconds is not None) == (kind == 2)]
        if not shown:
            continue
        patches, grids[f"{modality}_grid_thw"] = tower_inputs(model, shown)
        see = inner.get_image_features if kind == 1 else inner.get_video_features
        features = torch.cat(list(see(patches, grids[f"{modality}_grid_thw"]).pooler_output))
        mask = input_ids == getattr(model.config, f"{modality}_token_id")
        embeds = embeds.masked_scatter(mask[..., None], features.to(embeds.dtype))
        kinds[mask] = kind
    position_ids, _ = inner.get_rope_index(input_ids, kinds, second_per_grid_ts=torch.tensor(seconds), **grids)
    return embeds, position_ids


def eager_selection(model: Any, prompt: Prompt) -> "tuple[torch.Tensor, torch.Tensor]":
    """Saliency [N] FP32 and tower features [N, D], as `vision_model` defines them, by the Hugging Face tower itself.

    Eager attention holds all weights of a frame, so pictures come one at a time.

    Raises:
        CapaError: no block of the tower sees whole frames.
    """
    import torch
    from transformers.vision_utils import get_vision_window_index

    tower = model.model.visual
    merge = tower.spatial_merge_size
    saliency, features = [torch.empty(0)], [torch.empty(0, tower.config.out_hidden_size)]
    for picture in prompt.pictures:
        patches, grid = tower_inputs(model, [picture])
        block = tower.blocks[last_full_block(tower.fullatt_block_indexes, len(tower.blocks))]
        with attention_weights(tower, block.attn) as weights:
            features.append(tower(patches.to(tower.dtype), grid_thw=grid).pooler_output)
        received = torch.cat([frame_1LL[0].mean(0) for frame_1LL in weights])
        # The tower runs window by window, and puts its visual tokens back in order at the end.
        order, _ = get_vision_window_index(grid, merge, tower.window_size, tower.patch_size)
        saliency.append(received.unflatten(0, (-1, merge**2)).mean(1)[order.argsort()])
    return torch.cat(saliency), torch.cat(features)
