"""Plans a build from `config.json` alone: FLOPs, KV cache, sizes and memory, and whether there is room."""

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from capa_export.base.dims import ModelDims, Section
from capa_export.base.disk import check_disk, free_bytes
from capa_export.base.errors import CapaError, ExitCode
from capa_export.base.machine import available_memory
from capa_export.base.precision import FORMATS
from capa_export.calibrate.sums import CALIBRATION, Calibration
from capa_export.config.quantization import check_groups, rounding
from capa_export.config.recipe import Recipe, check_layers
from capa_export.config.target import Target
from capa_export.config.weights import Weights, WeightsWish
from capa_export.model.checkpoint import fetch_config, fetch_json
from capa_export.model.families import load_family
from capa_export.model.hub import full_source
from capa_export.model.lockstep import TOGETHER_BYTES
from capa_export.model.memory import LIBRARIES, calibration_bytes, validation_bytes
from capa_export.model.quantized.formats import HF_QUANT_CONFIG, find_format, held
from capa_export.model.visual_tokens import visual_tokens
from capa_export.plan.device_memory import (
    choose_weights,
    decoder_bytes,
    device_memory,
    devices_with_room,
    engine_weight_bytes,
    onnx_runtime_bytes,
    shared_weights,
)
from capa_export.plan.finished import finished_stages, plain_layers
from capa_export.plan.flops import (
    KVCacheSize,
    Parameters,
    decode_flops,
    flops,
    kv_cache,
    parameters,
)
from capa_export.plan.forecast import forecasts

__all__ = [
    "UNKNOWN",
    "check_engine_disk",
    "check_engine_memory",
    "dry_run",
    "layerwise_validation_bytes",
    "room",
]

UNKNOWN = "unknown until calibrated"
"""The linear layers' entry where neither a calibration nor a list of the paper names them."""

_TEXT_TOKENS = 48
"""Resident before any weight is: Python with torch and transformers, or TensorRT."""
_TENSORRT = 1100 << 20
"""Resident in the build of an engine whose weights are inputs; 1.05 GB was measured for a 7B."""
_PER_EMBEDDED_BYTE, _PER_JOINED_BYTE = 1.7, 2.0
"""Bytes that a build needs for a byte of embedded weights: 1.5 was measured for a 3B, 1.6 for a 7B in INT4, a quarter
more where one engine has two profiles; and mapped files want room."""
_PROMPTS = TOGETHER_BYTES
"""Hidden states and caches of the prompts that a validation takes through a layer together."""
_ENGINES, _REFERENCE = "engines", "reference"
"""Files of engines, and the graphs in FP32 that stand beside them while a validation holds all models in memory."""
_VALIDATION = 1_500_000_000
"""Resident in a validation before any weight is: torch, transformers and ONNX Runtime."""


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
    **options: Any,
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
        target: the device that runs the bundle, whose engines are planned too, if it has any.
        options: of `room`.

    Raises:
        CapaError: the config or the calibration cannot be read, or does not fit the recipe.
    """
    config = fetch_config(checkpoint, revision=revision)
    where = f"{checkpoint}: config.json"
    beside = fetch_json(checkpoint, (HF_QUANT_CONFIG,), revision=revision).get(HF_QUANT_CONFIG)
    settings = None if beside is None else Section(beside, f"{checkpoint}: {HF_QUANT_CONFIG}", "")
    form = find_format(config, where, settings)
    dims = load_family(recipe.family).model_dims(config, where=where)
    check_groups(recipe.quantize, recipe.quantize_head, dims.decoder)
    packed = rounding(recipe.quantize)
    if form is not None and recipe.quantize != "none":
        packed = held(form, packed, where)
        if recipe.auto_precision:
            raise CapaError(
                f"--auto-precision: {checkpoint} is quantized already, and stays as it is; leave it away",
                ExitCode.USAGE,
            )
    known = {"source": full_source(checkpoint), "revision": revision}
    plain = plain_layers(out, recipe, known)
    num_plain = len(plain or ())
    packed = None if num_plain == dims.decoder.num_layers else packed
    head = rounding(recipe.quantize_head)
    decoder = replace(dims.decoder, packed=packed, num_plain=num_plain, packed_head=head)
    dims = replace(dims, decoder=decoder, packed_vision=rounding(recipe.quantize_vision))
    if target is not None:
        target.require_packed_weights(dims.packings)
    check_layers(recipe, dims.decoder.num_layers)
    room_options: dict[str, Any] = {
        "target": target,
        "ffn": ffn,
        "calibration": calibration,
        "checkpoint": known,
        **options,
    }
    if calibration is None and out is not None and (out / CALIBRATION).exists():
        calibration = out
    linear, basis = _linear_layers(recipe, calibration, dims.decoder.num_layers, ffn=ffn)
    visual = visual_tokens(recipe, checkpoint, dims, revision=revision)
    kept = recipe.prune.num_keep([visual])
    stages = [(stage.layer, count) for stage, count in zip(recipe.prune.schedule, kept, strict=True)]
    sizes: dict[str, Any] = {"num_visual": visual, "num_text": _TEXT_TOKENS, "schedule": stages}
    prefill = flops(dims.decoder, **sizes, linear_layers=linear, selectors=recipe.prune.selectors)
    cache = kv_cache(dims.decoder, **sizes, element_bytes=FORMATS[precision].num_bytes)
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
        "plain_layers": plain,
        "parameters": asdict(parameters(dims)),
        "prefill": asdict(prefill),
        "decode": asdict(decode_flops(dims.decoder, **sizes)),
        "kv_cache": asdict(cache),
        "vision": {"total": dims.vision.flops(visual)},
        "forecast": [] if target is None else forecasts(target, dims, precision, prefill, cache),
        **room(recipe, visual, dims, precision, out, **room_options),
    }


def room(
    recipe: Recipe,
    visual: int,
    dims: ModelDims[Any],
    precision: str,
    out: Path | None,
    *,
    target: Target | None,
    ffn: bool,
    calibration: Path | None,
    checkpoint: Mapping[str, Any],
    weights: WeightsWish = "auto",
    in_place: bool = False,
    memory: int | None = None,
    layer_by_layer: bool | None = None,
) -> dict[str, Any]:
    """Sizes of files, memory here and on the device, and why a build would be refused.

    Args:
        recipe: says how many of them are kept.
        visual: tokens of one picture.
        dims: of the model.
        precision: of weights and activations.
        out: bundle that is made; its finished stages take no more room.
        target: the device; None where nothing is to be refused.
        ffn: whether visual FFNs are replaced at all.
        calibration: a file or bundle that stands in place of a run.
        checkpoint: what is known of it, as `finished_stages` takes it.
        weights: where its engines find theirs.
        in_place: whether the ONNX files read the checkpoint's own shards.
        memory: bytes that the device has, where one of the target's is meant.
        layer_by_layer: how calibration and validation hold the model; False whatever it takes.

    Raises:
        CapaError: the target lacks a limit that the model's graphs need.
    """
    kept = recipe.prune.num_keep([visual])
    stages = [(stage.layer, count) for stage, count in zip(recipe.prune.schedule, kept, strict=True)]
    sizes: dict[str, Any] = {"num_visual": visual, "num_text": _TEXT_TOKENS, "schedule": stages}
    width, total = FORMATS[precision].num_bytes, parameters(dims)
    cache = kv_cache(dims.decoder, **sizes, element_bytes=width)
    where, reason = choose_weights(dims, precision, weights, target, memory) if target and target.engine else (None, "")
    plan: dict[str, Any] = {
        "files": _files(total, width, where, in_place=in_place),
        "memory": _memory(dims, precision, where),
        "memory_available": available_memory(),
        "weights": where,
        "weights_because": reason,
        "device": None if target is None else _device(dims, precision, where, target, cache, memory),
    }
    refusals: list[str] = []
    if target is not None:
        wishes: dict[str, Any] = {"ffn": ffn, "calibration": calibration, "in_place": in_place, "weights": where}
        done = finished_stages(out, recipe, precision, checkpoint=checkpoint, **wishes)
        refusals = _refusals(plan, dims, precision, target, out, done, layer_by_layer=layer_by_layer)
    return {**plan, "refusals": refusals}


def _files(total: Parameters, width: int, engines: Weights | None, *, in_place: bool) -> dict[str, int]:
    """Bytes by kind of file; `engines` is where they find their weights, None where none are built."""
    files = {
        "onnx weights": decoder_bytes(total, width) + total.bytes_of_tower(width),
        "embedding.safetensors": total.embedding * width,
    }
    if in_place:
        files = dict.fromkeys(files, 0)
    return (
        {**files, _ENGINES: engine_weight_bytes(total, width, engines)} if engines in ("embedded", "joined") else files
    )


def _memory(dims: ModelDims[Any], precision: str, engines: Weights | None) -> dict[str, int]:
    """Peak bytes by stage on this machine, and of running the bundle in ONNX Runtime."""
    total, width = parameters(dims), FORMATS[precision].num_bytes
    stages = {
        "calibrate": calibration_bytes(total.total),
        "calibrate layer by layer": calibration_bytes(0) + int(4 / dims.decoder.num_layers * total.total),
        "export": LIBRARIES,
        "validate": validation_bytes(total.total, precision),
        "validate layer by layer": layerwise_validation_bytes(dims),
        "run": onnx_runtime_bytes(dims),
    }
    return {**stages, "engine": _engine_bytes(total, width, engines)} if engines else stages


def _device(
    dims: ModelDims[Any],
    precision: str,
    weights: Weights | None,
    target: Target,
    cache: KVCacheSize,
    memory: int | None,
) -> dict[str, Any]:
    """The memory that the device needs, the target's devices with room, and a way out where `memory` is too small."""

    def needed(precision: str, weights: Weights | None, target: Target = target) -> int:
        return device_memory(dims, precision, weights or "external", target, cache).total

    held = device_memory(dims, precision, weights or "external", target, cache)
    shared = shared_weights(dims)
    remedies = {
        f"--weights {shared}": needed(precision, shared) if weights == "embedded" else held.total,
        "--precision fp16": needed("fp16", weights) if precision == "fp32" else held.total,
        f"both --precision fp16 and --weights {shared}": needed("fp16", shared),
    }
    enough = [option for option, size in remedies.items() if memory is not None and size <= memory < held.total]
    return {
        "target": target.name,
        **asdict(held),
        "total": held.total,
        "devices": [
            (name, target.devices[name].memory, fits) for name, fits in devices_with_room(target, held.total).items()
        ],
        "given": memory,
        "remedy": enough[0] if enough else None,
    }


def _refusals(
    plan: Mapping[str, Any],
    dims: ModelDims[Any],
    precision: str,
    target: Target,
    out: Path | None,
    done: AbstractSet[str],
    *,
    layer_by_layer: bool | None,
) -> list[str]:
    """Why a build would be refused: for want of memory here or on the device, or of disk."""
    memory, available = plan["memory"], plan["memory_available"]
    refusals: list[str] = []
    device = plan["device"]
    if device["given"] is not None and device["total"] > device["given"]:
        refusals.append(_no_room(device, target))
    builds_here = target.engine is not None and target.engine.built != "on-device"
    if builds_here and f"engine/{target.name}" not in done:
        refusals += filter(None, [_engine_refusal(dims, precision, plan["weights"])])
    remedies = {
        "calibrate": "pass --calibration with one that was made on a larger machine",
        "validate": "build on a larger machine; `calibrate`, `export` and `engine`, each by itself, take less",
    }
    for stage, remedy in remedies.items():
        by_layer = memory[f"{stage} layer by layer"]
        needed = by_layer if layer_by_layer else min(memory[stage], by_layer)
        if needed > available and stage not in done and layer_by_layer is not False:
            refusals.append(
                f"{stage} takes {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are available; {remedy}"
            )
    if out is None:
        return refusals
    by_layer = memory["validate"] > available if layer_by_layer is None else layer_by_layer
    copy = 0 if by_layer else 4 * parameters(dims).total
    makers = {_ENGINES: f"engine/{target.name}", _REFERENCE: "validate"}
    files = {**plan["files"], _REFERENCE: copy}
    missing = {name: n for name, n in files.items() if makers.get(name, "export") not in done}
    shared = shared_weights(dims)
    width = FORMATS[precision].num_bytes
    held = engine_weight_bytes(parameters(dims), width, shared) if shared == "joined" else 0
    return refusals + _disk_refusals(missing, out, shared, held)


def _no_room(device: Mapping[str, Any], target: Target) -> str:
    """Why a device of so much memory is refused, and what would do."""
    others = [f"{name} ({size:g} GB)" for name, size, fits in device["devices"] if fits]
    room = f"a device with more, as {others[0]}" if others else "a smaller model"
    limits = "" if target.engine is None else ", or a target of your own with lower limits in [engine.dims]"
    remedy = f"build with {device['remedy']}" if device["remedy"] else f"take {room}{limits}"
    return (
        f"--memory: {target.name} takes {device['total'] / 1e9:.1f} GB to run it, {device['given'] / 1e9:g} GB are "
        f"given; {remedy}"
    )


def _disk_refusals(missing: Mapping[str, int], out: Path, shared: Weights, held: int) -> list[str]:
    """Why the disk has no room for the missing files, by kind; engines that share weights take `held` bytes."""
    needed, free = sum(missing.values()), free_bytes(out)
    if needed <= free:
        return []
    remedies = {_ENGINES: (f"build with --weights {shared}", held), _REFERENCE: ("pass --layer-by-layer", 0)}
    less = "".join(
        f", or {remedy}, which takes {(needed - missing[name] + still) / 1e9:.1f} GB"
        for name, (remedy, still) in remedies.items()
        if missing.get(name, 0) > still
    )
    copy = ", and their copy in FP32 while they are validated," if missing.get(_REFERENCE) else ""
    sizes = f"{needed / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free"
    return [f"{out}: ONNX files and engines{copy} take {sizes}; free some{less}, or choose another --out"]


def check_engine_memory(dims: ModelDims[Any], precision: str, weights: Weights) -> None:
    """Refuse engines whose building needs more memory than there is.

    Raises:
        CapaError: they do.
    """
    if refusal := _engine_refusal(dims, precision, weights):
        raise CapaError(refusal)


def check_engine_disk(dims: ModelDims[Any], precision: str, weights: Weights, folder: Path) -> None:
    """Refuse engines with weights in them that the disk cannot hold.

    Raises:
        CapaError: it has less free space than they take.
    """
    if weights != "external":
        check_disk(folder, engine_weight_bytes(parameters(dims), FORMATS[precision].num_bytes, weights))


def _engine_refusal(dims: ModelDims[Any], precision: str, weights: Weights) -> str | None:
    """Why engines cannot be built here, if they cannot."""
    total, width = parameters(dims), FORMATS[precision].num_bytes
    needed, available = _engine_bytes(total, width, weights), available_memory()
    if needed <= available:
        return None
    other: Weights = "embedded" if total.packed else "external"
    less = _engine_bytes(total, width, other)
    remedy = (
        f"build with --weights {other}, which takes {less / 1e9:.1f} GB"
        if other != weights and less <= available
        else "end other programs, or build on a larger machine"
    )
    return (
        f"engines with {weights} weights take {needed / 1e9:.1f} GB of memory to build, {available / 1e9:.1f} GB are "
        f"available; {remedy}"
    )


def _engine_bytes(total: Parameters, width: int, weights: Weights) -> int:
    """Peak of the largest build; each engine has a process of its own."""
    embedded = max(decoder_bytes(total, width), total.bytes_of_tower(width)) if weights != "external" else 0
    return _TENSORRT + int((_PER_JOINED_BYTE if weights == "joined" else _PER_EMBEDDED_BYTE) * embedded)


def layerwise_validation_bytes(dims: ModelDims[Any]) -> int:
    """Peak of a validation layer by layer: three FP32 copies of a layer or of the head, and what prompts leave."""
    total = parameters(dims)
    largest = max(total.decoder // dims.decoder.num_layers, total.embedding)
    return _VALIDATION + _PROMPTS + 3 * 4 * largest


def _calibrated(calibration: Path | None) -> float | None:
    """Mean visual tokens of a prompt of the user's own, where a calibration has seen some."""
    return None if calibration is None else Calibration.load(calibration).mean_visual_tokens


def _linear_layers(
    recipe: Recipe, calibration: Path | None, num_layers: int, *, ffn: bool
) -> tuple[tuple[int, ...], str]:
    if not ffn:
        return (), "/full"
    if calibration is not None:
        found = Calibration.load(calibration)
        if found.measured(recipe.ffn):
            return found.scaled_layers(recipe.ffn), "calibration"
        return found.linear_layers(recipe.ffn.eta), "calibration, by cosine alone"
    if not recipe.ffn.paper_layers:
        return (), UNKNOWN
    return tuple(layer for layer in recipe.ffn.paper_layers if layer < num_layers), "the paper, until calibrated"
