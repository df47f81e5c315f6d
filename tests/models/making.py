"""What the small models have in common."""

from pathlib import Path
from typing import Any

import torch

__all__ = ["randomized", "saved"]


def randomized(model_class: Any, config: Any, seed: int, spread: float = 0.6) -> Any:
    """A model in which nothing is zero or one, which would hide a mistake in it."""
    torch.manual_seed(seed)
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "cls_token", "position_embeddings")):
                parameter.normal_(0, 0.2)
            elif parameter.ndim == 1:
                parameter.normal_(1, 0.2)
            else:
                parameter.normal_(0, spread * parameter[0].numel() ** -0.5)
    return model


def saved(folder: Path, model: Any, tokenizer: Any, image_processor: Any, **options: Any) -> Path:
    """A whole checkpoint folder, tokenizer and image processor included; `options` are those of `save_pretrained`."""
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder, **options)
    tokenizer.save_pretrained(folder)
    image_processor.save_pretrained(folder)
    return folder
