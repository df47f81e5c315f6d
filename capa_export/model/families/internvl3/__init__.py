"""InternVL3 and InternVL3.5: tensor names, prompt format, and the eager model's inputs."""

from collections.abc import Mapping, Sequence
from math import isqrt
from typing import TYPE_CHECKING, Any

import numpy as np

from capa_export.base.dims import ModelDims
from capa_export.base.errors import CapaError
from capa_export.model.checkpoint import Checkpoint
from capa_export.model.eager_attention import attention_weights
from capa_export.model.families.internvl3.dims import VisionDims, model_dims
from capa_export.model.families.internvl3.original import ORIGINAL, PREPROCESSOR, preprocessor_config
from capa_export.model.families.internvl3.original import translated as translation_of
from capa_export.model.families.internvl3.pixels import check_bounds, num_tokens, picture_options
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
    "picture_files",
    "picture_options",
    "pictures",
    "placeholder",
    "positions",
    "translated",
    "vision_model",
    "written",
]

ARCHITECTURE = "InternVLForConditionalGeneration"

UNUSED: tuple[str, ...] = ()
RENAMES = [
    (r"^model\.vision_tower\.", "vision_tower."),
    (r"^model\.multi_modal_projector\.", "multi_modal_projector."),
    (r"^model\.language_model\.", "model."),
    (r"^language_model\.model\.", "model."),
    (r"^language_model\.lm_head\.", "lm_head."),
]
"""Stored tensor names, in either layout that transformers writes, to the names of the graph."""

IMAGE_OPTIONS = {"crop_to_patches": True}
"""The published preprocessor_config.json says otherwise; transformers' own processor overrides it with this."""


def translated(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint, in transformers' layout where it is in its authors'."""
    if checkpoint.config.get("model_type") != ORIGINAL:
        return checkpoint
    # What is not supported is refused under the names that its own file has.
    model_dims(checkpoint.config, where=str(checkpoint.folder / "config.json"))
    return translation_of(checkpoint)


def picture_files(config: Mapping[str, Any], files: Mapping[str, Any]) -> Mapping[str, Any]:
    """The image processor's files, by name, in transformers' layout where the config is in its authors'."""
    if config.get("model_type") != ORIGINAL:
        return files
    return {PREPROCESSOR: preprocessor_config(config, files.get(PREPROCESSOR, {}))}


def vision_model(dims: VisionDims, dtype: "ir.DataType", *, selection: bool = False) -> "ir.Model":
    """The graph of the vision tower; who runs one does not wait for the imports that make one."""
    from capa_export.model.families.internvl3 import vision

    return vision.vision_model(dims, dtype, selection=selection)


def pictures(processed: Any, dims: ModelDims[VisionDims]) -> list[Picture]:
    """The image processor's tiles, the thumbnail last where there are several, in one array a picture."""
    vision = dims.vision
    tiles = np.asarray(processed["pixel_values"], dtype=np.float32)
    expected = (vision.in_channels, vision.image_size, vision.image_size)
    if tiles.shape[1:] != expected:
        raise CapaError(
            f"the image processor makes tiles of {list(tiles.shape[1:])}, the vision tower takes {list(expected)}; "
            "use the preprocessor_config.json that was published with the weights"
        )
    result: list[Picture] = []
    start = 0
    for count in np.asarray(processed["num_patches"]).tolist():
        tile = (vision.token_side, vision.token_side)
        grid = tile if count == 1 else None
        num_tokens = count * vision.tokens_per_tile
        result.append(Picture(tiles[start : start + count], num_tokens=num_tokens, grid=grid, tile=tile))
        start += count
    return result


def placeholder(tokenizer: Any, dims: ModelDims[VisionDims]) -> str:
    """The text that the chat template writes where a picture stands."""
    return tokenizer.convert_ids_to_tokens(dims.image_token_id)


def written(mark: str, picture: Picture) -> str:
    """The placeholder once per visual token, between the marks of a picture."""
    return f"<img>{mark * picture.num_tokens}</img>"


def positions(is_visual: np.ndarray, _shown: Sequence[Picture]) -> tuple[np.ndarray, int]:
    """Positions [1, T], one after the other, and the position of the first answer token."""
    return np.arange(len(is_visual), dtype=np.int64)[None], len(is_visual)


def eager_inputs(model: Any, prompt: Prompt) -> "tuple[torch.Tensor, torch.Tensor]":
    """Input embeddings [1, T, D] and position ids [1, T], by the model's own methods alone."""
    import torch

    inner = model.model
    input_ids = torch.from_numpy(prompt.input_ids)[None]
    embeds = inner.get_input_embeddings()(input_ids)
    if prompt.pictures:
        tiles = torch.from_numpy(np.concatenate([picture.patches for picture in prompt.pictures]))
        features = inner.get_image_features(tiles).pooler_output.to(embeds.dtype)
        mask = inner.get_placeholder_mask(input_ids, inputs_embeds=embeds, image_features=features)
        embeds = embeds.masked_scatter(mask, features)
    return embeds, torch.arange(input_ids.shape[1])[None]


def eager_selection(model: Any, prompt: Prompt) -> "tuple[torch.Tensor, torch.Tensor]":
    """Saliency [N] FP32 and tower features [N, 4*D], as `vision_model` defines them, by the Hugging Face tower itself.

    Eager attention holds all weights of a layer, so tiles come one at a time.
    """
    import torch

    inner, ratio = model.model, model.config.downsample_ratio
    tower = inner.vision_tower

    def squares(patches_1PD: "torch.Tensor") -> "torch.Tensor":
        side = isqrt(patches_1PD.shape[1])
        return inner.pixel_shuffle(patches_1PD.unflatten(1, (side, side)), scale_factor=ratio).flatten(0, 2)

    if not prompt.pictures:
        return torch.empty(0), torch.empty(0, round(tower.config.hidden_size / ratio**2))
    tiles = torch.from_numpy(np.concatenate([picture.patches for picture in prompt.pictures])).to(tower.dtype)
    with attention_weights(tower, tower.encoder.layer[-1].attention) as weights:
        features = torch.cat([squares(tower(tile).last_hidden_state[:, 1:]) for tile in tiles.split(1)])
    saliency = torch.cat([squares(weights_1LL[:, 0, 1:, None]) for weights_1LL in weights]).mean(1)
    return saliency, features
