"""LLaVA-1.5: tensor names, prompt format, and the eager model's inputs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from capa_export.base.dims import ModelDims
from capa_export.base.errors import CapaError
from capa_export.model.eager_attention import attention_weights
from capa_export.model.families.llava15.dims import VisionDims, model_dims
from capa_export.model.families.llava15.pixels import check_bounds, num_tokens, picture_options
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
    "vision_model",
    "written",
]

ARCHITECTURE = "LlavaForConditionalGeneration"

IMAGE_OPTIONS: dict[str, bool] = {}
RENAMES = [
    (r"^(?:model\.)?vision_tower\.(?:vision_model\.)?", "vision_tower."),
    (r"^(?:model\.)?multi_modal_projector\.", "multi_modal_projector."),
    (r"^model\.language_model\.", "model."),
    (r"^language_model\.model\.", "model."),
    (r"^language_model\.lm_head\.", "lm_head."),
]
"""Stored tensor names, as transformers 4 and 5 save them, to the names of the graph."""

UNUSED = (r"vision_tower\.(?:encoder\.layers\.\d+|post_layernorm)\.",)
"""Tensors behind the selected layer of the vision tower."""


def vision_model(dims: VisionDims, dtype: "ir.DataType", *, selection: bool = False) -> "ir.Model":
    """The graph of the vision tower; who runs one does not wait for the imports that make one."""
    from capa_export.model.families.llava15 import vision

    return vision.vision_model(dims, dtype, selection=selection)


def pictures(processed: Any, dims: ModelDims[VisionDims]) -> list[Picture]:
    """The pictures of a prompt, all of them resized and cropped to the same square."""
    vision = dims.vision
    pixels = np.asarray(processed["pixel_values"], dtype=np.float32)
    shape = (vision.num_channels, vision.image_size, vision.image_size)
    if pixels.shape[1:] != shape:
        raise CapaError(
            f"preprocessor_config.json makes pictures of {list(pixels.shape[1:])}, config.json implies {list(shape)}; "
            "use the two files that were published together"
        )
    grid = None if vision.keeps_class_token else (vision.grid, vision.grid)
    return [Picture(tile[None], num_tokens=vision.num_tokens, grid=grid, square=True) for tile in pixels]


def placeholder(tokenizer: Any, dims: ModelDims[VisionDims]) -> str:
    """The text that the chat template writes where a picture stands."""
    return tokenizer.convert_ids_to_tokens(dims.image_token_id)


def written(mark: str, picture: Picture) -> str:
    """The placeholder once per visual token."""
    return mark * picture.num_tokens


def positions(is_visual: np.ndarray, _shown: Sequence[Picture]) -> tuple[np.ndarray, int]:
    """Positions [1, T] that count every token, and the position of the first answer token."""
    length = len(is_visual)
    return np.arange(length, dtype=np.int64)[None], length


def eager_inputs(model: Any, prompt: Prompt) -> "tuple[torch.Tensor, torch.Tensor]":
    """Input embeddings [1, T, D] and position ids [1, T], by the model's own methods alone."""
    import torch

    inner = model.model
    input_ids = torch.from_numpy(prompt.input_ids)[None]
    embeds = inner.get_input_embeddings()(input_ids)
    position_ids = torch.arange(input_ids.shape[1])[None]
    if not prompt.pictures:
        return embeds, position_ids
    pixels = torch.from_numpy(np.concatenate([picture.patches for picture in prompt.pictures]))
    features = torch.cat(list(inner.get_image_features(pixels).pooler_output)).to(embeds.dtype)
    mask = inner.get_placeholder_mask(input_ids, embeds, features[None])
    return embeds.masked_scatter(mask, features), position_ids


def eager_selection(model: Any, prompt: Prompt) -> "tuple[torch.Tensor, torch.Tensor]":
    """Saliency [N] FP32 and tower features [N, D], as `vision_model` defines them, by the Hugging Face tower itself.

    Eager attention holds all weights of a layer, so pictures come one at a time.
    """
    import torch

    tower, config = model.model.vision_tower, model.config
    if not prompt.pictures:
        return torch.empty(0), torch.empty(0, config.vision_config.hidden_size)
    # The first of the hidden states are the embeddings.
    selected = range(len(tower.encoder.layers) + 1)[config.vision_feature_layer]
    first = 1 if config.vision_feature_select_strategy == "default" else 0
    with attention_weights(tower, tower.encoder.layers[selected - 1].self_attn) as weights:
        pixels = [torch.from_numpy(picture.patches) for picture in prompt.pictures]
        seen = [tower(each, output_hidden_states=True).hidden_states[selected] for each in pixels]
    saliency = torch.cat([weights_1SS[0, 0, first:] for weights_1SS in weights])
    return saliency, torch.cat([x_1SD[0, first:] for x_1SD in seen])
