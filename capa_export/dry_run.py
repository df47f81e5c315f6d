"""What a build would do, from `config.json` alone: FLOPs, KV cache, sizes and memory."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from capa_export.bind import check_disk
from capa_export.calibration import CALIBRATION, Calibration
from capa_export.checkpoint import fetch_config
from capa_export.dims import ModelDims
from capa_export.errors import CapaError
from capa_export.families import load_family
from capa_export.measure import available_memory
from capa_export.plan import Parameters, decode_flops, flops, kv_cache, parameters
from capa_export.recipe import Recipe, check_layers
from capa_export.target import Target
from capa_export.visual_tokens import visual_tokens

__all__ = [
    "UNKNOWN",
    "calibration_bytes",
    "check_engine_disk",
    "check_engine_memory",
    "dry_run",
    "run_bytes",
    "run_memory",
    "validation_bytes",
]

UNKNOWN = "unknown until calibrated"
"""Where no calibration and no list of the paper says which layers are linear."""

_TEXT_TOKENS = 48
_LIBRARIES = 500 << 20
"""Resident before any weight is: Python with torch and transformers, or TensorRT."""
_TENSORRT = 1100 << 20
"""Resident in the build of an engine whose weights are inputs; 1.05 GB was measured for a 7B."""
_PER_EMBEDDED_BYTE = 1.7
"""What a build needs for a byte of weights that it embeds: 1.5 was measured for a 3B, and mapped files want room."""
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
    weights: Literal["embedded", "external", "in-place"] = "embedded",
) -> dict[str, Any]:
    """Plan for one picture of the recipe's size, as this checkpoint sees it; loads no weights and no torch.

    Args:
        recipe: with the command line's ratio and layer in it.
        checkpoint: folder, or hub id whose config is then fetched.
        out: bundle whose calibration says which layers are linear; without one the paper's list is assumed.
        precision: of weights and activations.
        ffn: whether visual FFNs are replaced at all.
        revision: of a hub id.
        calibration: a file or bundle that says it in place of `out`.
        target: whose engines are planned too, if it has any.
        weights: where its engines find theirs; in place, the ONNX files hold none either.

    Raises:
        CapaError: the config or the calibration cannot be read, or does not fit the recipe.
    """
    config = fetch_config(checkpoint, revision=revision)
    dims = load_family(recipe.family).model_dims(config, where=f"{checkpoint}: config.json")
    check_layers(recipe, dims.decoder.num_layers)
    if calibration is None and out is not None and (out / CALIBRATION).exists():
        calibration = out
    linear, basis = _linear_layers(recipe, calibration, dims.decoder.num_layers, ffn=ffn)
    visual = visual_tokens(recipe, checkpoint, dims, revision=revision)
    kept = recipe.prune.num_keep([visual])
    stages = [(stage.layer, count) for stage, count in zip(recipe.prune.schedule, kept, strict=True)]
    sizes: dict[str, Any] = {"num_visual": visual, "num_text": _TEXT_TOKENS, "schedule": stages}
    width = _ELEMENT_BYTES[precision]
    total = parameters(dims)
    engines = ("embedded" if weights == "embedded" else "external") if target and target.engine else None
    return {
        "model": recipe.name,
        "checkpoint": checkpoint,
        "precision": precision,
        "picture": list(recipe.picture),
        "visual_tokens": visual,
        "calibrated_visual_tokens": _calibrated(calibration),
        "text_tokens": _TEXT_TOKENS,
        "stages": [
            {
                "layer": stage.layer,
                "where": stage.where,
                "selector": stage.selector,
                "kept": count,
                "visual": visual,
            }
            for stage, count in zip(recipe.prune.schedule, kept, strict=True)
        ],
        "linear_layers": list(linear),
        "linear_layers_from": basis,
        "parameters": asdict(total),
        "prefill": asdict(flops(dims.decoder, **sizes, linear_layers=linear, selectors=recipe.prune.selectors)),
        "decode": asdict(decode_flops(dims.decoder, **sizes)),
        "kv_cache": asdict(kv_cache(dims.decoder, **sizes, element_bytes=width)),
        "vision": {"total": dims.vision.flops(visual)},
        "files": _files(total, width, engines, in_place=weights == "in-place"),
        "memory": _memory(total, width, engines, dims.decoder.num_layers),
        "memory_available": available_memory(),
        "refusal": _engine_refusal(total, width) if engines == "embedded" else None,
    }


def _files(total: Parameters, width: int, engines: str | None, *, in_place: bool) -> dict[str, int]:
    """Bytes by kind of file; `engines` is where they find their weights, None where none are built."""
    decoder = _decoder(total)
    files = {"onnx weights": (decoder + total.vision) * width, "embedding.safetensors": total.embedding * width}
    if in_place:
        return dict.fromkeys(files, 0)
    return {**files, "engines": _engine_files(total, width)} if engines == "embedded" else files


def _engine_files(total: Parameters, width: int) -> int:
    """Bytes of engines with embedded weights; prefill and decode each hold the decoder's."""
    return (2 * _decoder(total) + total.vision) * width


def _decoder(total: Parameters) -> int:
    """Parameters of a decoder graph; a tied head is stored for the graphs once more."""
    return total.decoder + (total.lm_head or total.embedding)


def check_engine_memory(dims: ModelDims[Any], precision: str, weights: Literal["embedded", "external"]) -> None:
    """Refuse engines whose building needs more memory than there is.

    Raises:
        CapaError: they do, and external weights would not.
    """
    refusal = _engine_refusal(parameters(dims), _ELEMENT_BYTES[precision]) if weights == "embedded" else None
    if refusal:
        raise CapaError(refusal)


def check_engine_disk(dims: ModelDims[Any], precision: str, folder: Path) -> None:
    """Refuse engines with embedded weights that the disk cannot hold.

    Raises:
        CapaError: it has less free space than they take.
    """
    check_disk(folder, _engine_files(parameters(dims), _ELEMENT_BYTES[precision]))


def run_memory(dims: ModelDims[Any], precision: str) -> int:
    """Peak of running a bundle's graphs in ONNX Runtime."""
    return _LIBRARIES + 2 * _ELEMENT_BYTES[precision] * parameters(dims).total


def run_bytes(dims: ModelDims[Any], precision: str, num_tokens: int) -> int:
    """Weights once, and the KV cache of a prompt of which nothing is removed."""
    width, total = _ELEMENT_BYTES[precision], parameters(dims)
    cache = kv_cache(dims.decoder, num_visual=0, num_text=num_tokens, schedule=[], element_bytes=width)
    return (_decoder(total) + total.vision + total.embedding) * width + cache.dense_bytes


def _engine_refusal(total: Parameters, width: int) -> str | None:
    """Why engines with embedded weights cannot be built here, if they cannot."""
    needed, available = _engine_bytes(total, width, "embedded"), available_memory()
    if needed <= available:
        return None
    return (
        f"engines with embedded weights take {needed / 1e9:.1f} GB of memory to build, {available / 1e9:.1f} GB are "
        f"available; build with --weights external, which takes {_engine_bytes(total, width, 'external') / 1e9:.1f} GB"
    )


def _engine_bytes(total: Parameters, width: int, weights: str) -> int:
    """Peak of the largest build; each engine has a process of its own."""
    embedded = max(_decoder(total), total.vision) * width if weights == "embedded" else 0
    return _TENSORRT + int(_PER_EMBEDDED_BYTE * embedded)


def _memory(total: Parameters, width: int, engines: str | None, num_layers: int) -> dict[str, int]:
    """Peak bytes by stage."""
    per_parameter = {
        # The eager model, in FP32.
        "calibrate": 4,
        "calibrate layer by layer": 4 / num_layers,
        "export": 0,
        "validate": 4 + 2 + 2 * 4 + 2 * width,
        "run": 2 * width,
    }
    stages = {stage: _LIBRARIES + int(total.total * size) for stage, size in per_parameter.items()}
    return {**stages, "engine": _engine_bytes(total, width, engines)} if engines else stages


def validation_bytes(num_parameters: int, precision: str) -> int:
    """Peak of a validation with all models in memory.

    The eager model and its half copy; prefill and decode in ONNX Runtime, in FP32 and in the bundle's precision.
    """
    return _LIBRARIES + (4 + 2 + 2 * 4 + 2 * _ELEMENT_BYTES[precision]) * num_parameters


def calibration_bytes(num_parameters: int) -> int:
    """Peak of a calibration with the whole eager model in memory, in FP32."""
    return _LIBRARIES + 4 * num_parameters


def _calibrated(calibration: Path | None) -> float | None:
    """Mean visual tokens of a prompt of the user's own, where a calibration has seen some."""
    return None if calibration is None else Calibration.load(calibration).mean_visual_tokens


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
