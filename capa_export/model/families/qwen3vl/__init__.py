"""Qwen3-VL: Qwen2.5-VL's prompts and positions, and DeepStack in the eager model's inputs."""

from typing import TYPE_CHECKING, Any

from capa_export.model.families.qwen3vl.dims import model_dims
from capa_export.model.families.qwen25vl import (
    IMAGE_OPTIONS,
    RENAMES,
    UNUSED,
    check_bounds,
    num_tokens,
    picture_options,
    pictures,
    placeholder,
    positions,
    tower_inputs,
    written,
)
from capa_export.model.prompt import Prompt

if TYPE_CHECKING:
    import onnx_ir as ir

    from capa_export.model.eager_plan import EagerInputs

__all__ = [
    "ARCHITECTURE",
    "IMAGE_OPTIONS",
    "RENAMES",
    "UNUSED",
    "check_bounds",
    "eager_inputs",
    "model_dims",
    "num_tokens",
    "picture_options",
    "pictures",
    "placeholder",
    "positions",
    "vision_model",
    "written",
]

ARCHITECTURE = "Qwen3VLForConditionalGeneration"


def vision_model(dims: Any, dtype: "ir.DataType") -> "ir.Model":
    """The graph of the vision tower; who runs one does not wait for the imports that make one."""
    from capa_export.model.families.qwen3vl import vision

    return vision.vision_model(dims, dtype)


def eager_inputs(model: Any, prompt: Prompt) -> "EagerInputs":
    """Embeddings, mRoPE positions and DeepStack features, by the model's own methods alone."""
    import torch

    from capa_export.model.eager_plan import EagerInputs

    inner = model.model
    input_ids = torch.from_numpy(prompt.input_ids)[None]
    embeds = inner.get_input_embeddings()(input_ids)
    if not prompt.pictures:
        return EagerInputs(embeds, torch.arange(input_ids.shape[1]).expand(3, 1, -1))
    patches, grid = tower_inputs(model, prompt.pictures)
    seen = inner.get_image_features(patches, grid)
    features = torch.cat(list(seen.pooler_output)).to(embeds.dtype)
    mask, _ = inner.get_placeholder_mask(input_ids, embeds, features)
    embeds = embeds.masked_scatter(mask, features)
    position_ids, _ = inner.get_rope_index(input_ids, mask[..., 0].int(), image_grid_thw=grid)
    return EagerInputs(embeds, position_ids, [torch.cat(list(part)) for part in seen.deepstack_features])
