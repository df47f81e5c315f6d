"""What a build would do, from `config.json` alone: FLOPs, KV cache, sizes and memory."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from capa_export.calibration import CALIBRATION, Calibration
from capa_export.checkpoint import fetch_config
from capa_export.families import load_family
from capa_export.plan import Parameters, decode_flops, flops, kv_cache, parameters
from capa_export.recipe import Recipe, check_layers, kept_tokens
from capa_export.target import Target

__all__ = ["UNKNOWN", "dry_run"]

UNKNOWN = "unknown until calibrated"
"""Where no calibration and no list of the paper says which layers are linear."""

_TEXT_TOKENS = 48
_LIBRARIES = 500 << 20
"""Resident before any weight is: Python with torch and transformers, or TensorRT."""
_ELEMENT_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}


def dry_run(
    recipe: Recipe,
    checkpoint: str,
    out: Path | None,
    precision: str,
    *,
    ffn: bool,
    revision: str | None = None,
    calibration: Path | None = None,
    target: Target | None = None,
    weights: Literal["embedded", "external"] = "embedded",
) -> dict[str, Any]:
    """Plan for one picture of the recipe's size; loads no weights and no torch.

    Args:
        recipe: with the command line's ratio and layer in it.
        checkpoint: folder, or hub id whose config is then fetched.
        out: bundle whose calibration says which layers are linear; without one the paper's list is assumed.
        precision: of weights and activations.
        ffn: whether visual FFNs are replaced at all.
        revision: of a hub id.
        calibration: a file or bundle that says it in place of `out`.
        target: whose engines are planned too, if it has any.
        weights: where its engines find theirs.

    Raises:
        CapaError: the config or the calibration cannot be read, or does not fit the recipe.
    """
    config = fetch_config(checkpoint, revision=revision)
    dims = load_family(recipe.family).model_dims(config, where=f"{checkpoint}: config.json")
    check_layers(recipe, dims.decoder.num_layers)
    if calibration is None and out is not None and (out / CALIBRATION).exists():
        calibration = out
    linear, basis = _linear_layers(recipe, calibration, dims.decoder.num_layers, ffn=ffn)
    stages = [(stage.layer, kept_tokens(recipe.visual_tokens, stage.ratio)) for stage in recipe.prune.schedule]
    sizes: dict[str, Any] = {"num_visual": recipe.visual_tokens, "num_text": _TEXT_TOKENS, "schedule": stages}
    width = _ELEMENT_BYTES[precision]
    total = parameters(dims)
    engines = weights if target is not None and target.engine is not None else None
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
        "files": _files(total, width, engines),
        "memory": _memory(total.total, width, engines),
    }


def _files(total: Parameters, width: int, engines: str | None) -> dict[str, int]:
    """Bytes by kind of file; `engines` is where they find their weights, None where none are built."""
    # A tied head is stored for the graphs once more.
    decoder = total.decoder + (total.lm_head or total.embedding)
    files = {"onnx weights": (decoder + total.vision) * width, "embedding.safetensors": total.embedding * width}
    # Prefill and decode each embed the decoder.
    return {**files, "engines": (2 * decoder + total.vision) * width} if engines == "embedded" else files


def _memory(parameters: int, width: int, engines: str | None) -> dict[str, int]:
    """Peak bytes by stage."""
    engine = {"embedded": 2 * width, "external": 0}
    per_parameter = {
        # The eager model, in FP32.
        "calibrate": 4,
        "export": 0,
        **({"engine": engine[engines]} if engines else {}),
        # The eager model and its half copy; prefill and decode in ONNX Runtime, in FP32 and in the bundle's precision.
        "validate": 4 + 2 + 2 * 4 + 2 * width,
        "run": 2 * width,
    }
    return {stage: _LIBRARIES + parameters * size for stage, size in per_parameter.items()}


def _linear_layers(
    recipe: Recipe, calibration: Path | None, num_layers: int, *, ffn: bool
) -> tuple[tuple[int, ...], str]:
    if not ffn:
        return (), "--no-ffn"
    if calibration is not None:
        return Calibration.load(calibration).linear_layers(recipe.ffn.eta), "calibration"
    if not recipe.ffn.paper_layers:
        return (), UNKNOWN
    return tuple(layer for layer in recipe.ffn.paper_layers if layer < num_layers), "the paper, until calibrated"
