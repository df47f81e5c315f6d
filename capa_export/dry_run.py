"""What a build would do, from `config.json` alone: FLOPs, KV cache, sizes and memory."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from capa_export.calibration import CALIBRATION, Calibration
from capa_export.checkpoint import fetch_config
from capa_export.families import load_family
from capa_export.plan import decode_flops, flops, kv_cache, parameters
from capa_export.recipe import Recipe, kept_tokens

__all__ = ["dry_run"]

_TEXT_TOKENS = 48
_LIBRARIES = 500 << 20
"""Resident before any weight is: Python with torch and transformers, or TensorRT."""
_ELEMENT_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}


def dry_run(recipe: Recipe, checkpoint: str, out: Path | None, precision: str, *, ffn: bool) -> dict[str, Any]:
    """Plan for one picture of the recipe's size; loads no weights and no torch.

    Args:
        recipe: with the command line's ratio and layer in it.
        checkpoint: folder, or hub id whose config is then fetched.
        out: bundle whose calibration says which layers are linear; without one the paper's list is assumed.
        precision: of weights and activations.
        ffn: whether visual FFNs are replaced at all.

    Raises:
        CapaError: the config cannot be read or does not fit the recipe.
    """
    config = fetch_config(checkpoint)
    dims = load_family(recipe.family).model_dims(config, where=f"{checkpoint}: config.json")
    linear, basis = _linear_layers(recipe, out, dims.decoder.num_layers, ffn=ffn)
    stages = [(stage.layer, kept_tokens(recipe.visual_tokens, stage.ratio)) for stage in recipe.prune.schedule]
    sizes: dict[str, Any] = {"num_visual": recipe.visual_tokens, "num_text": _TEXT_TOKENS, "schedule": stages}
    width = _ELEMENT_BYTES[precision]
    total = parameters(dims)
    data = total.total * width
    return {
        "model": recipe.name,
        "checkpoint": checkpoint,
        "precision": precision,
        "visual_tokens": recipe.visual_tokens,
        "text_tokens": _TEXT_TOKENS,
        "stages": [{"layer": layer, "kept": kept, "visual": recipe.visual_tokens} for layer, kept in stages],
        "linear_layers": list(linear),
        "linear_layers_from": basis,
        "parameters": asdict(total),
        "prefill": asdict(flops(dims.decoder, **sizes, linear_layers=linear)),
        "decode": asdict(decode_flops(dims.decoder, **sizes)),
        "kv_cache": asdict(kv_cache(dims.decoder, **sizes, element_bytes=width)),
        "vision": {"total": dims.vision.flops(recipe.visual_tokens)},
        "files": {"onnx weights": data, "embedding.safetensors": total.embedding * width},
        "memory": {
            "calibrate": _LIBRARIES + total.total * 4,
            "export": _LIBRARIES,
            "engine": _LIBRARIES + 2 * data,
            "validate": _LIBRARIES + total.total * (8 + width),
        },
    }


def _linear_layers(recipe: Recipe, out: Path | None, num_layers: int, *, ffn: bool) -> tuple[tuple[int, ...], str]:
    if not ffn:
        return (), "--no-ffn"
    if out is not None and (out / CALIBRATION).exists():
        return Calibration.load(out).linear_layers(recipe.ffn.eta), "calibration"
    return tuple(layer for layer in recipe.ffn.paper_layers if layer < num_layers), "the paper, until calibrated"
