"""The memory that a model's engines take on a device, and the devices that have room for it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from capa_export.base.dims import ModelDims, PackedLayers
from capa_export.base.errors import CapaError, ExitCode
from capa_export.base.precision import FORMATS
from capa_export.base.progress import say
from capa_export.base.weight_types import NumberKind
from capa_export.config.target import Target
from capa_export.config.weights import Weights, WeightsWish
from capa_export.graph.contract import CACHE_ROWS
from capa_export.model.memory import LIBRARIES
from capa_export.plan.flops import KVCacheSize, Parameters, parameters

__all__ = [
    "EMBEDDED_LIMIT",
    "DeviceMemory",
    "choose_weights",
    "decoder_bytes",
    "decoder_parameters",
    "device_memory",
    "devices_with_room",
    "engine_weight_bytes",
    "onnx_runtime_bytes",
    "say_weights",
    "shared_weights",
]

EMBEDDED_LIMIT = 1 << 30
"""Bytes of a decoder up to which prefill and decode hold it each, since it is copied with the engine and nothing else.

Beyond it the second copy takes more than an eighth of the smallest card, and building pays for it: on two cores with
TensorRT-RTX 1.7, engines with the weights in them against engines that share them took 22 s and 1.6 GB of memory
against 16 s and 0.9 GB where the decoder has 0.27 GB, and 133 s and 16.6 GB against 31 s and 0.7 GB where it has 6.2.
"""
_JOINED = "in one engine that is prefill and decode, which takes one prompt at a time"
_ANSWER = 64
"""Tokens of an answer that a cache has room for."""
_CONTEXT = 16 << 20
"""Bytes that an execution context takes at least; decode's, of any model, takes no more."""
_CUDA = 500_000_000
"""CUDA's own context and the kernels of the engines."""
_SYSTEM = 1_500_000_000
"""Bytes of the system and of this program, where CPU and GPU share the memory."""
_PER_ONNX_PARAMETER = 4.4
"""ONNX Runtime keeps FP32 copies on the CPU, of each graph; 4.2 was measured in FP16."""


_PER_PACKED_PARAMETER: Mapping[NumberKind, float] = {"int4": 0.7, "int8": 1.6, "fp8": 2.8, "nvfp4": _PER_ONNX_PARAMETER}
"""Of those in few bits. INT4 and INT8 it has in its own order, and as the file has them one by one while it is opened:
0.67 and 1.53 were measured, of 4 bits with a scale to 128 and a zero point, and of 8; of FP8 the numbers, 1.7, and one
weight dequantized; NVFP4 it dequantizes for good."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceMemory:
    """Bytes that are held while a prompt is answered."""

    weights: int
    kv_cache: int
    contexts: int
    """Activations at the largest shapes of the profile, taken for good; of one engine, since all share the memory."""
    runtime: int
    """Bytes of the runtime and the system."""

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.contexts + self.runtime


def device_memory(
    dims: ModelDims[Any],
    precision: str,
    weights: Weights,
    target: Target,
    cache: KVCacheSize,
    contexts: int | None = None,
) -> DeviceMemory:
    """Count what answering one prompt takes on a device.

    Args:
        dims: of the model.
        precision: of weights and activations.
        weights: whether engines share them.
        target: the device; one without engines runs ONNX Runtime.
        cache: of the prompt.
        contexts: the most that TensorRT reported for one of the engines, if they are built.

    Raises:
        CapaError: the target lacks a limit that the model's graphs need.
    """
    if target.engine is None:
        held, least = _held(cache, step=1, copies=2), LIBRARIES
        return DeviceMemory(weights=onnx_runtime_bytes(dims) - least, kv_cache=held, contexts=0, runtime=least)
    width, total = FORMATS[precision].num_bytes, parameters(dims)
    return DeviceMemory(
        weights=engine_weight_bytes(total, width, weights),
        kv_cache=_held(cache, step=CACHE_ROWS, copies=1),
        contexts=_context_bytes(dims, width, weights, target) if contexts is None else contexts,
        # The embedding stays in the host's memory.
        runtime=_CUDA + (_SYSTEM + total.embedding * width if target.shares_memory else 0),
    )


def engine_weight_bytes(total: Parameters, width: int, weights: Weights) -> int:
    """Bytes of weights on the device; prefill and decode each hold the decoder's where they do not share them.

    A head of few bits they share in one engine alone.
    """
    copies = 2 if weights == "embedded" else 1
    heads = 2 if total.head_bits and weights == "external" else copies
    return copies * total.bytes_of_layers(width) + heads * total.bytes_of_head(width) + total.bytes_of_tower(width)


def decoder_bytes(total: Parameters, width: int) -> int:
    """Bytes of a decoder graph's weights; `width` is that of a number that is not packed."""
    return total.bytes_of_layers(width) + total.bytes_of_head(width)


def decoder_parameters(total: Parameters) -> int:
    """Parameters of a decoder graph; a tied head is stored for the graphs once more."""
    return total.decoder + total.head


def onnx_runtime_bytes(dims: ModelDims[Any], *, exact: bool = False) -> int:
    """Peak of running a bundle's graphs in ONNX Runtime on the CPU; prefill and decode each hold the decoder.

    Args:
        dims: of the model.
        exact: whether products with weights of few bits are computed in FP32, which holds all but INT4 in FP32.
    """
    total, plain = parameters(dims), _PER_ONNX_PARAMETER

    def each(form: PackedLayers | None) -> float:
        return plain if form is None or (exact and form.kind != "int4") else _PER_PACKED_PARAMETER[form.kind]

    layers, head, tower = map(each, (dims.decoder.packed, dims.decoder.packed_head, dims.packed_vision))
    decoder = plain * (total.decoder - total.packed) + layers * total.packed + head * total.head
    vision = plain * (total.vision - total.packed_vision) + tower * total.packed_vision
    return LIBRARIES + int(2 * decoder + vision)


def _held(cache: KVCacheSize, *, step: int, copies: int) -> int:
    """Bytes of a prompt's caches: the one that prefill left, and those of decode, in and out or in place."""
    held = 0
    for group in cache.groups:
        rows = -(-(group.num_tokens + _ANSWER - 1) // step) * step
        held += (group.num_tokens + copies * rows) * (group.capa_bytes // group.num_tokens)
    return held


def _context_bytes(dims: ModelDims[Any], width: int, weights: Weights, target: Target) -> int:
    """Activations of the hungriest engine; within 7% of what TensorRT-RTX 1.7 reports for decoders of 1B to 8B.

    Products with weights of few bits are fused with less of what is around them, and zero points add a product to each.
    """
    decoder, engine = dims.decoder, target.require_engine()

    def limit(name: str) -> int:
        return target.dim(name).max

    kept = max((one.max for one in engine.values.values()), default=0)
    tokens = max(limit("sequence"), kept + limit("text"))
    projected = (decoder.num_heads + 2 * decoder.num_kv_heads) * decoder.head_dim
    inner, outer = 2, 3
    if (form := decoder.packed) is not None:
        inner, outer = 5 if form.has_zeros else 3, 4 if form.group else 5
    prefill = tokens * (inner * decoder.intermediate_size + projected + outer * decoder.hidden_size)
    tower = dims.vision.activations(limit, embedded=weights != "external")
    return max(prefill, tower) * width + _CONTEXT


def devices_with_room(target: Target, needed: int) -> dict[str, bool]:
    """Name of each device of a target -> whether it has so many bytes.

    A card of 8 GB has a little more than 8e9 bytes, which its driver takes.
    """
    return {name: needed <= device.memory * 1e9 for name, device in target.devices.items()}


def choose_weights(
    dims: ModelDims[Any], precision: str, asked: WeightsWish, target: Target, memory: int | None = None
) -> tuple[Weights, str]:
    """Choose where the engines' weights go; returns the choice and its reason.

    Args:
        dims: of the model.
        precision: of the weights.
        asked: by the user; an explicit wish wins.
        target: the device.
        memory: bytes that it has, if that is known.

    Raises:
        CapaError: the target lacks a limit that the model's graphs need, or weights of few bits are to be external.
    """
    packed = dims.decoder.packed
    if packed and asked == "external":
        raise CapaError(
            f"--weights external: as inputs of an engine, {packed.type.name} weights would be dequantized at every "
            "step by a kernel of their own; leave it away, or build with --quantize none",
            ExitCode.USAGE,
        )
    if asked != "auto":
        return asked, f"as asked, {_JOINED}" if asked == "joined" else "as asked"
    total, width, shared = parameters(dims), FORMATS[precision].num_bytes, shared_weights(dims)
    twice, once = (engine_weight_bytes(total, width, where) for where in ("embedded", shared))
    how = _JOINED if packed else "that the engines share"
    if memory is not None and twice + _context_bytes(dims, width, "embedded", target) + _CUDA > memory:
        return shared, f"{once / 1e9:.1f} GB {how}; embedded, {twice / 1e9:.1f} GB would not fit {memory / 1e9:g} GB"
    if packed and target.require_engine().runtime != "tensorrt-rtx":
        return "embedded", (
            f"{twice / 1e9:.1f} GB; whether TensorRT holds weights of few bits once where one engine is prefill and "
            f"decode was not tried: --weights joined, {once / 1e9:.1f} GB if it does"
        )
    if decoder_bytes(total, width) > EMBEDDED_LIMIT:
        return shared, f"{once / 1e9:.1f} GB {how}; embedded, {twice / 1e9:.1f} GB"
    return "embedded", f"a decoder of {decoder_bytes(total, width) / 1e9:.2g} GB is small enough to hold twice"


def shared_weights(dims: ModelDims[Any]) -> Literal["joined", "external"]:
    """Where prefill and decode have their weights once.

    Those of few bits are multiplied as they are stored only where an engine has them as constants.
    """
    return "external" if dims.decoder.packed is None else "joined"


def say_weights(asked: str, weights: str, because: str) -> None:
    """Say where the engines' weights go and why, unless the user said it and it has no consequences."""
    if asked == "auto" or weights == "joined":
        say(f"{'weights':<14}{weights}: {because}")
