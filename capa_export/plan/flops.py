"""The cost of a build's graphs, from the dimensions alone: FLOPs, KV cache, weights.

One multiply-accumulate is 2 FLOPs. Matrix products are counted, and the scale that stands for a visual FFN; norms,
rotary positions, softmax, activations and the ranking of scores are not: they are far below 1 %.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from types import MappingProxyType
from typing import Any

from capa_export.base.dims import DecoderDims, ModelDims
from capa_export.base.errors import CapaError, ExitCode
from capa_export.base.precision import FORMATS
from capa_export.selectors.selector import CAPA, SelectorChoice, Size, load_selector

__all__ = [
    "DecodeFlops",
    "DecoderFlops",
    "KVCacheSize",
    "KVGroup",
    "Parameters",
    "PrefillFlops",
    "decode_flops",
    "flops",
    "kv_cache",
    "parameters",
]

Schedule = Sequence[tuple[int, int]]
"""(layer, visual tokens kept from there on), in the order of layers; layer -1 is before the decoder."""
Selectors = Mapping[int, SelectorChoice]
"""Layer -> what chooses them; CAPA where it says nothing."""
_NONE: Selectors = MappingProxyType({})


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderFlops:
    """FLOPs of one pass through the decoder."""

    projections: int
    """FLOPs of the query, key, value and output projections."""
    attention: int
    """QK^T and AV over all S x S pairs, as a dense kernel computes them."""
    attention_causal: int
    """FLOPs of the pairs of tokens at or below the diagonal only."""
    ffn: int
    score: int
    """Scores of the tokens, at every stage."""
    lm_head: int
    """FLOPs of the last token's logits."""
    total: int
    """Sum that counts `attention`."""
    total_causal: int
    """Sum that counts `attention_causal`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillFlops:
    """FLOPs of the prompt's pass, dense and with CAPA."""

    num_visual: int
    num_text: int
    schedule: tuple[tuple[int, int], ...]
    linear_layers: tuple[int, ...]
    dense: DecoderFlops
    capa: DecoderFlops
    dense_visual: DecoderFlops
    """FLOPs of the prompt's visual tokens, without text and LM head."""
    capa_visual: DecoderFlops
    ratio: float
    """Dense over CAPA, `total`."""
    ratio_visual: float


@dataclass(frozen=True, kw_only=True, slots=True)
class KVGroup:
    """Neighbouring layers whose caches have the same length."""

    first_layer: int
    last_layer: int
    num_tokens: int
    dense_bytes: int
    capa_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class KVCacheSize:
    """Bytes of the keys and values of one prompt."""

    groups: tuple[KVGroup, ...]
    dense_bytes: int
    capa_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeFlops:
    """FLOPs of the first generated token, attending to the prompt's cache and itself, all its FFNs full."""

    dense: int
    capa: int
    dense_attention: int
    capa_attention: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameters:
    """Weights by part; a tied head is counted once, as the embedding."""

    embedding: int
    decoder: int
    """Layers and last norm."""
    packed: int
    """Those of the layers that graphs hold in few bits."""
    packed_bytes: int
    """Bytes of their numbers, and of scales that are FP8."""
    packed_scales: int
    """Their scales that are plain numbers, and zero points."""
    lm_head: int
    """0 when tied."""
    head_bits: int
    """Bits of a number of the head in a graph that holds it in few; 0 where it is plain."""
    head_scales: int
    """Its scales then."""
    vision: int
    packed_vision: int
    """Those of the vision tower that graphs hold in 8 bits."""
    vision_scales: int
    """Their scales."""
    total: int
    bytes: dict[str, int]
    """Bytes of `total`, by precision."""

    def bytes_of_layers(self, width: int) -> int:
        """Bytes of the decoder's layers in a graph.

        Args:
            width: bytes of a number that is not packed.
        """
        return (self.decoder - self.packed + self.packed_scales) * width + self.packed_bytes

    def bytes_of_tower(self, width: int) -> int:
        """Bytes of the vision tower, as `bytes_of_layers` counts."""
        return (self.vision - self.packed_vision + self.vision_scales) * width + self.packed_vision

    @property
    def head(self) -> int:
        """Those of the head in a graph, which has one of its own where it is tied."""
        return self.lm_head or self.embedding

    def bytes_of_head(self, width: int) -> int:
        """Bytes of the head in a graph, as `bytes_of_layers` counts."""
        return self.head * self.head_bits // 8 + self.head_scales * width if self.head_bits else self.head * width


def flops(
    dims: DecoderDims,
    *,
    num_visual: int,
    num_text: int,
    schedule: Schedule,
    linear_layers: Collection[int],
    selectors: Selectors = _NONE,
) -> PrefillFlops:
    """Count the prefill.

    Where a stage acts after the attention of its layer, that runs on the tokens that enter it; the FFN and all that
    follows on those it keeps.

    Args:
        dims: of the decoder.
        num_visual: visual tokens in the prompt.
        num_text: all the others.
        schedule: where visual tokens are dropped, and how many stay.
        linear_layers: layers in which visual tokens take a scale instead of the FFN.
        selectors: of the stages.

    Raises:
        CapaError: the schedule or the linear layers do not fit the model or the prompt.
    """
    _check(dims, num_visual, schedule, linear_layers)
    dense, dense_visual = (_prefill(dims, num_visual, text, (), (), _NONE) for text in (num_text, 0))
    capa, capa_visual = (_prefill(dims, num_visual, text, schedule, linear_layers, selectors) for text in (num_text, 0))
    return PrefillFlops(
        num_visual=num_visual,
        num_text=num_text,
        schedule=tuple(schedule),
        linear_layers=tuple(sorted(linear_layers)),
        dense=dense,
        capa=capa,
        dense_visual=dense_visual,
        capa_visual=capa_visual,
        ratio=_ratio(dense.total, capa.total),
        ratio_visual=_ratio(dense_visual.total, capa_visual.total),
    )


def _check(dims: DecoderDims, num_visual: int, schedule: Schedule, linear_layers: Collection[int]) -> None:
    layers, kept = [layer for layer, _ in schedule], [num_visual, *(kept for _, kept in schedule)]
    for layer in (*layers, *linear_layers):
        if not (-1 if layer in layers[:1] else 0) <= layer < dims.num_layers:
            raise CapaError(f"layer {layer}: the decoder has layers 0 to {dims.num_layers - 1}", ExitCode.USAGE)
    if layers != sorted(set(layers)) or kept != sorted(kept, reverse=True) or kept[-1] < 0:
        raise CapaError(
            f"schedule {list(schedule)}: layers must rise and kept tokens must not, from {num_visual}", ExitCode.USAGE
        )


def _ratio(dense: int, capa: int) -> float:
    return dense / capa if capa else 1.0


def _visual_by_layer(
    num_layers: int, num_visual: int, schedule: Schedule, selectors: Selectors = _NONE
) -> list[tuple[int, int]]:
    """Visual tokens in the attention and in the FFN of every layer."""
    kept, counts = dict(schedule), list[tuple[int, int]]()
    num_visual = kept.get(-1, num_visual)
    for layer in range(num_layers):
        entering, num_visual = num_visual, kept.get(layer, num_visual)
        counts.append((num_visual if selectors.get(layer, CAPA).place == "entry" else entering, num_visual))
    return counts


def _projections(dims: DecoderDims) -> int:
    """Weights of q, k, v and o, biases left out."""
    return dims.hidden_size * dims.head_dim * 2 * (dims.num_heads + dims.num_kv_heads)


def _prefill(
    dims: DecoderDims,
    num_visual: int,
    num_text: int,
    schedule: Schedule,
    linear_layers: Collection[int],
    selectors: Selectors,
) -> DecoderFlops:
    width = dims.num_heads * dims.head_dim
    projections = attention = causal = ffn = score = 0
    scored = num_visual
    for layer, kept in schedule:
        chosen = selectors.get(layer, CAPA)
        size = Size(tokens=scored + num_text, visual=scored, keep=kept, dims=dims, options=chosen.values)
        score += load_selector(chosen.name).flops(size)
        scored = kept
    for layer, (entering, leaving) in enumerate(_visual_by_layer(dims.num_layers, num_visual, schedule, selectors)):
        tokens = entering + num_text
        projections += 2 * tokens * _projections(dims)
        attention += 4 * tokens * tokens * width
        causal += 2 * tokens * (tokens + 1) * width
        through_ffn = num_text if layer in linear_layers else num_text + leaving
        ffn += 6 * through_ffn * dims.hidden_size * dims.intermediate_size
        ffn += leaving * dims.hidden_size if layer in linear_layers else 0
    lm_head = 2 * dims.hidden_size * dims.vocab_size if num_text else 0
    rest = projections + ffn + score + lm_head
    return DecoderFlops(
        projections=projections,
        attention=attention,
        attention_causal=causal,
        ffn=ffn,
        score=score,
        lm_head=lm_head,
        total=rest + attention,
        total_causal=rest + causal,
    )


def kv_cache(
    dims: DecoderDims, *, num_visual: int, num_text: int, schedule: Schedule, element_bytes: int = 2
) -> KVCacheSize:
    """Size the caches that prefill leaves, by group of layers of equal length; a prune layer keeps what it leaves.

    Raises:
        CapaError: the schedule does not fit the model or the prompt.
    """
    _check(dims, num_visual, schedule, ())
    per_token = 2 * dims.num_kv_heads * dims.head_dim * element_bytes
    lengths = [leaving + num_text for _, leaving in _visual_by_layer(dims.num_layers, num_visual, schedule)]
    groups: list[KVGroup] = []
    for length, members in groupby(range(dims.num_layers), key=lengths.__getitem__):
        layers = list(members)
        groups.append(
            KVGroup(
                first_layer=layers[0],
                last_layer=layers[-1],
                num_tokens=length,
                dense_bytes=len(layers) * (num_visual + num_text) * per_token,
                capa_bytes=len(layers) * length * per_token,
            )
        )
    return KVCacheSize(
        groups=tuple(groups),
        dense_bytes=sum(group.dense_bytes for group in groups),
        capa_bytes=sum(group.capa_bytes for group in groups),
    )


def decode_flops(dims: DecoderDims, *, num_visual: int, num_text: int, schedule: Schedule) -> DecodeFlops:
    """Count the first generated token.

    Raises:
        CapaError: the schedule does not fit the model or the prompt.
    """
    _check(dims, num_visual, schedule, ())
    layer_weights = _projections(dims) + 3 * dims.hidden_size * dims.intermediate_size
    linear = 2 * (dims.num_layers * layer_weights + dims.hidden_size * dims.vocab_size)
    dense, capa = (
        sum(
            4 * (leaving + num_text + 1) * dims.num_heads * dims.head_dim
            for _, leaving in _visual_by_layer(dims.num_layers, num_visual, stages)
        )
        for stages in ((), schedule)
    )
    return DecodeFlops(dense=linear + dense, capa=linear + capa, dense_attention=dense, capa_attention=capa)


def parameters(dims: ModelDims[Any]) -> Parameters:
    """Count the weights, biases and norms included."""
    decoder = dims.decoder
    size, inner = decoder.hidden_size, decoder.intermediate_size
    biases = (decoder.num_heads + 2 * decoder.num_kv_heads) * decoder.head_dim if decoder.attention_bias else 0
    norms = 2 * size + (2 * decoder.head_dim if decoder.qk_norm else 0)
    linear = decoder.num_layers * (_projections(decoder) + 3 * size * inner)
    layers = linear + decoder.num_layers * (biases + norms) + size
    embedding = decoder.vocab_size * size
    lm_head = 0 if decoder.tie_word_embeddings else embedding
    total = embedding + layers + lm_head + dims.vision.num_parameters
    packed, packed_bytes, scales = 0, 0, 0
    if (form := decoder.packed) is not None:
        outputs = (decoder.num_heads + 2 * decoder.num_kv_heads) * decoder.head_dim + 2 * (size + inner)
        num_packed = decoder.num_layers - decoder.num_plain
        packed = linear // decoder.num_layers * num_packed
        packed_bytes = packed * form.type.bits // 8
        scales = packed // form.group if form.group else num_packed * outputs
        scales *= 2 if form.has_zeros else 1
        if not form.type.in_engines:
            packed_bytes, scales = packed_bytes + scales, 0
    head = decoder.packed_head
    tower = () if dims.packed_vision is None else dims.vision.num_blocks * tuple(dims.vision.block_products)
    return Parameters(
        embedding=embedding,
        decoder=layers,
        packed=packed,
        packed_bytes=packed_bytes,
        packed_scales=scales,
        lm_head=lm_head,
        head_bits=0 if head is None else head.type.bits,
        head_scales=0 if head is None else embedding // head.group if head.group else decoder.vocab_size,
        vision=dims.vision.num_parameters,
        packed_vision=sum(outputs * inputs for outputs, inputs in tower),
        vision_scales=sum(outputs for outputs, _ in tower),
        total=total,
        bytes={name: form.num_bytes * total for name, form in FORMATS.items()},
    )
