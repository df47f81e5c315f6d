"""The two decoder graphs over one set of weights: prefill with the CAPA nodes, and decode.

Prefill takes one prompt: it is bound by compute, so a batch of unequal prompts would gain padding and nothing else.
Decode is bound by reading the weights, so it takes a batch of caches, each row as long as it is.

B = batch, T = tokens, D = hidden size, H = query heads, G = KV heads, d = head size, X = text tokens, K = tokens kept.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import onnx_ir as ir
from onnxscript import OpBuilder, nn

from capa_export.base.dims import DecoderDims
from capa_export.base.precision import FP16_MAX
from capa_export.graph.build import END, Input, build_model, call
from capa_export.graph.contract import (
    DEEPSTACK_EMBEDS,
    INPUTS_EMBEDS,
    LOGITS,
    NUM_KEEP,
    PAST_LENGTHS,
    POSITION_IDS,
    TEXT_POSITIONS,
    cache_length,
    kept_name,
    past_names,
    present_names,
)
from capa_export.graph.layers import GatedMLP, Linear, RMSNorm, attention, heads_from_tokens, tokens_from_heads
from capa_export.graph.prune import Prune
from capa_export.graph.rotary import RotaryTables
from capa_export.graph.tokens import Heads, KeyValue, Scorer, Tokens
from capa_export.selectors.selector import CAPA, Place, SelectorChoice, prompt_inputs

__all__ = ["decode_model", "prefill_model"]


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, dims: DecoderDims, dtype: ir.DataType) -> None:
        super().__init__()
        self.dims = dims
        query_size, kv_size = dims.num_heads * dims.head_dim, dims.num_kv_heads * dims.head_dim
        self.q_proj = Linear(dims.hidden_size, query_size, dtype, bias=dims.attention_bias)
        self.k_proj = Linear(dims.hidden_size, kv_size, dtype, bias=dims.attention_bias)
        self.v_proj = Linear(dims.hidden_size, kv_size, dtype, bias=dims.attention_bias)
        self.o_proj = Linear(query_size, dims.hidden_size, dtype)
        self.q_norm = RMSNorm(dims.head_dim, dims.rms_norm_eps, dtype) if dims.qk_norm else None
        self.k_norm = RMSNorm(dims.head_dim, dims.rms_norm_eps, dtype) if dims.qk_norm else None

    def project(self, op: OpBuilder, x_TD: ir.Value, tokens: Tokens) -> Heads:
        """Queries, keys and values of the new tokens."""
        dims = self.dims
        query = heads_from_tokens(op, self.q_proj(op, x_TD), dims.num_heads, dims.head_dim, tokens.batch)
        key = heads_from_tokens(op, self.k_proj(op, x_TD), dims.num_kv_heads, dims.head_dim, tokens.batch)
        value = heads_from_tokens(op, self.v_proj(op, x_TD), dims.num_kv_heads, dims.head_dim, tokens.batch)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(op, query), self.k_norm(op, key)
        cos, sin = tokens.cos_BTd, tokens.sin_BTd
        return Heads(op.RotaryEmbedding(query, cos, sin), op.RotaryEmbedding(key, cos, sin), value, query, key)

    def forward(
        self,
        op: OpBuilder,
        x_TD: ir.Value,
        tokens: Tokens,
        past: KeyValue | None = None,
        mask: ir.Value | None = None,
    ) -> tuple[ir.Value, Heads]:
        """Output [T, D], and what it was computed from."""
        heads = self.project(op, x_TD, tokens)
        if past is not None:
            joined = (op.Concat(past[0], heads.key, axis=2), op.Concat(past[1], heads.value, axis=2))
            heads = replace(heads, key=joined[0], value=joined[1])
        head_dim = self.dims.head_dim
        mixed = attention(op, heads.query, heads.key, heads.value, head_dim, mask=mask, causal=past is None)
        return self.o_proj(op, tokens_from_heads(op, mixed, self.dims.num_heads * head_dim)), heads


class Layer(nn.Module):
    """One decoder layer; its FFN may be a scale for visual tokens, and tokens may go before or after its attention."""

    def __init__(
        self,
        dims: DecoderDims,
        dtype: ir.DataType,
        *,
        linear: bool,
        prune: Prune | None = None,
        prune_entry: Prune | None = None,
    ) -> None:
        super().__init__()
        self.prune_entry = prune_entry
        self.input_layernorm = RMSNorm(dims.hidden_size, dims.rms_norm_eps, dtype)
        self.self_attn = Attention(dims, dtype)
        self.prune = prune
        self.post_attention_layernorm = RMSNorm(dims.hidden_size, dims.rms_norm_eps, dtype)
        self.mlp = GatedMLP(dims.hidden_size, dims.intermediate_size, dtype)
        self.visual_scale = nn.Parameter([dims.hidden_size], dtype) if linear else None

    def forward(
        self,
        op: OpBuilder,
        tokens: Tokens,
        *,
        num_keep: ir.Value | None = None,
        prompted: Mapping[str, ir.Value] = MappingProxyType({}),
        before: Scorer | None = None,
        past: KeyValue | None = None,
        mask: ir.Value | None = None,
    ) -> tuple[Tokens, KeyValue, Scorer]:
        """Tokens after the layer, its keys and values, and what its attention says of the tokens.

        Args:
            op: builder.
            tokens: that enter it.
            num_keep: [1], of its stage if it has one.
            prompted: what the prompt brings along for selectors.
            before: the attention of the layer before.
            past: cached keys and values.
            mask: additive, of attention.
        """
        if self.prune_entry is not None:
            tokens, _ = self.prune_entry(op, tokens, num_keep, prompted, before)
        normed_TD = self.input_layernorm(op, tokens.hidden_TD)
        mixed_TD, heads = self.self_attn(op, normed_TD, tokens, past, mask)
        tokens = replace(tokens, hidden_TD=op.Add(tokens.hidden_TD, mixed_TD))
        cache, scorer = (heads.key, heads.value), (heads, self.self_attn.o_proj.weight)
        if self.prune is not None:
            tokens, cache = self.prune(op, tokens, num_keep, prompted, scorer)
        if self.visual_scale is None:
            tokens = replace(tokens, hidden_TD=self._ffn(op, tokens.hidden_TD))
        else:
            assert tokens.text_rows_X is not None
            text_XD = self._ffn(op, op.Gather(tokens.hidden_TD, tokens.text_rows_X, axis=0))
            (scaled_TD,) = call(op, "VisualScale", tokens.hidden_TD, self.visual_scale, text_XD, tokens.text_rows_X)
            tokens = replace(tokens, hidden_TD=scaled_TD)
        return tokens, cache, scorer

    def _ffn(self, op: OpBuilder, x_TD: ir.Value) -> ir.Value:
        """x + FFN(norm(x))."""
        return op.Add(x_TD, self.mlp(op, self.post_attention_layernorm(op, x_TD)))


class Stack(nn.Module):
    """All layers and the last norm."""

    def __init__(
        self,
        dims: DecoderDims,
        dtype: ir.DataType,
        rotary: RotaryTables,
        *,
        selectors: Mapping[int, SelectorChoice] = MappingProxyType({}),
        linear_layers: Sequence[int] = (),
        min_keep_per_image: int = 0,
    ) -> None:
        super().__init__("model")
        self.dims, self.dtype, self.rotary = dims, dtype, rotary

        def prune(layer: int, place: Place) -> Prune | None:
            chosen = selectors.get(layer)
            return Prune(dims, chosen, min_keep_per_image) if chosen is not None and chosen.place == place else None

        def layer(index: int) -> Layer:
            entry, after = prune(index, "entry"), prune(index, "attention")
            return Layer(dims, dtype, linear=index in linear_layers, prune=after, prune_entry=entry)

        self.prune = prune(-1, "input")

        self.layers = nn.ModuleList([layer(index) for index in range(dims.num_layers)])
        self.norm = RMSNorm(dims.hidden_size, dims.rms_norm_eps, dtype)


class Prefill(Stack):
    """The stack on a whole prompt."""

    def forward(
        self,
        op: OpBuilder,
        inputs_embeds: ir.Value,
        position_ids: ir.Value,
        *,
        text_positions: ir.Value,
        num_keep: ir.Value | None = None,
        deepstack_embeds: ir.Value | None = None,
        **prompted: ir.Value,
    ) -> tuple[ir.Value, list[KeyValue], tuple[ir.Value, ...]]:
        """Normed hidden state of the last token [1, D], keys and values per layer, kept positions per stage."""
        cos, sin = self.rotary(op, position_ids, self.dtype)
        tokens = Tokens(op.Squeeze(inputs_embeds, [0]), cos, sin, text_positions)
        if deepstack_embeds is not None:
            per_layer = [op.Gather(deepstack_embeds, layer, axis=0) for layer in range(self.dims.deepstack_layers)]
            tokens = replace(tokens, deepstack=tuple(per_layer))
        cache: list[KeyValue] = []
        scorer: Scorer | None = None

        def kept_here(*stages: Prune | None) -> ir.Value | None:
            index = len(tokens.kept)
            return None if all(stage is None for stage in stages) else op.Slice(num_keep, [index], [index + 1], [0])

        if self.prune is not None:
            tokens, _ = self.prune(op, tokens, kept_here(self.prune), prompted)
        for layer in self.layers:
            assert isinstance(layer, Layer)
            here = kept_here(layer.prune, layer.prune_entry)
            tokens, key_value, scorer = layer(op, tokens, num_keep=here, prompted=prompted, before=scorer)
            if tokens.deepstack:
                features_TD, *later = tokens.deepstack
                tokens = replace(tokens, hidden_TD=op.Add(tokens.hidden_TD, features_TD), deepstack=tuple(later))
            cache.append(key_value)
        return self.norm(op, op.Slice(tokens.hidden_TD, [-1], [END], [0])), cache, tokens.kept


class Decode(Stack):
    """The stack on text tokens behind KV caches."""

    def forward(
        self,
        op: OpBuilder,
        inputs_embeds: ir.Value,
        position_ids: ir.Value,
        past_lengths: ir.Value,
        past: Sequence[KeyValue],
        stages: Sequence[int],
    ) -> tuple[ir.Value, list[KeyValue]]:
        """Normed hidden state of each row's last token [B, D], and the grown cache.

        Args:
            op: builder.
            inputs_embeds: [B, S, D].
            position_ids: [axes, B, S].
            past_lengths: [1 + stages, B].
            past: cache per layer.
            stages: per layer, how many stages have pruned its cache.
        """
        dims = self.dims
        batch, num_new = op.Shape(inputs_embeds, start=0, end=1), op.Shape(inputs_embeds, start=1, end=2)
        flat_positions = op.Reshape(position_ids, [dims.position_axes, -1])
        rows = op.Concat(batch, op.Constant(value_ints=[-1, dims.head_dim // 2]), axis=0)
        cos, sin = (op.Reshape(table, rows) for table in self.rotary(op, flat_positions, self.dtype))
        tokens = Tokens(op.Reshape(inputs_embeds, [-1, dims.hidden_size]), cos, sin, batch=batch)
        cache: list[KeyValue] = []
        masks: dict[int, ir.Value] = {}
        for layer, key_value, stage in zip(self.layers, past, stages, strict=True):
            if stage not in masks:
                lengths_B = op.Slice(past_lengths, [stage], [stage + 1], [0])
                masks[stage] = _append_mask(op, num_new, key_value[0], lengths_B, self.dtype)
            tokens, grown, _ = layer(op, tokens, past=key_value, mask=masks[stage])
            cache.append(grown)
        hidden_BSD = op.Reshape(tokens.hidden_TD, op.Concat(batch, num_new, [dims.hidden_size], axis=0))
        last_BD = op.Reshape(op.Slice(hidden_BSD, [-1], [END], [1]), [-1, dims.hidden_size])
        return self.norm(op, last_BD), cache


def _append_mask(
    op: OpBuilder, num_new: ir.Value, past_key: ir.Value, lengths_B: ir.Value, dtype: ir.DataType
) -> ir.Value:
    """Additive mask [B, 1, S, P + S]: new tokens see each other causally and the last `lengths_B` of P cached ones."""
    num_past = op.Shape(past_key, start=2, end=3)
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    last_seen_S = op.Add(op.Range(zero, op.Squeeze(num_new, [0]), one), num_past)
    key_L = op.Range(zero, op.Squeeze(op.Add(num_past, num_new), [0]), one)
    later_SL = op.Greater(op.Unsqueeze(key_L, [0]), op.Unsqueeze(last_seen_S, [1]))
    padding_B = op.Reshape(op.Sub(num_past, lengths_B), [-1, 1, 1, 1])
    hidden_B1SL = op.Or(later_SL, op.Less(key_L, padding_B))
    lowest, none = (op.Cast(op.Constant(value_float=value), to=dtype) for value in (-FP16_MAX, 0.0))
    return op.Where(hidden_B1SL, lowest, none)


def _logits(op: OpBuilder, head: Linear, x_1D: ir.Value) -> ir.Value:
    return op.Cast(head(op, x_1D), to=ir.DataType.FLOAT)


def prefill_model(
    dims: DecoderDims,
    dtype: ir.DataType,
    rotary: RotaryTables,
    *,
    prune_layers: Sequence[int],
    linear_layers: Sequence[int],
    selectors: Mapping[int, SelectorChoice] = MappingProxyType({}),
    min_keep_per_image: int = 1,
    feature_size: int = 0,
) -> ir.Model:
    """Whole prompt in, logits of the last position, KV cache and kept positions out (CAPA, sections 4.1 and 4.2).

    `prune_layers` are the first layers whose caches are without what a stage drops, -1 before the decoder; `selectors`
    say what chooses there, CAPA where they say nothing.

    Inputs: inputs_embeds [1, T, D]; position_ids [axes, T]; text_positions [X], the rows that hold text, ascending and
    never dropped; num_keep [stages], the visual tokens each stage keeps, the best `min_keep_per_image` of every image
    before any other; an image is a run of visual tokens between text; where the decoder has DeepStack layers,
    deepstack_embeds [layers, T, D], what the first layers' outputs gain, zero where text stands; what selectors read of
    the prompt: visual_saliency [T], visual_features [T, F], visual_grid [2, T]. Outputs: logits [1, V]
    FP32; kept_positions.i [K_i], ascending prompt positions that survive stage i; present.l.key and .value
    [1, G, T_l, d].
    """
    chosen = {layer: selectors.get(layer, CAPA) for layer in prune_layers}
    stack = Prefill(
        dims,
        dtype,
        rotary,
        selectors=chosen,
        linear_layers=linear_layers,
        min_keep_per_image=min_keep_per_image,
    )
    head = Linear(dims.hidden_size, dims.vocab_size, dtype)
    head._set_name("lm_head")  # pyright: ignore[reportPrivateUsage]  # There is no public setter.
    inputs = [
        Input(INPUTS_EMBEDS, dtype, (1, "sequence", dims.hidden_size)),
        Input(POSITION_IDS, ir.DataType.INT64, (dims.position_axes, "sequence")),
        Input(TEXT_POSITIONS, ir.DataType.INT64, ("text",)),
    ]
    if prune_layers:
        inputs.append(Input(NUM_KEEP, ir.DataType.INT64, (len(prune_layers),)))
    if dims.deepstack_layers:
        inputs.append(Input(DEEPSTACK_EMBEDS, dtype, (dims.deepstack_layers, "sequence", dims.hidden_size)))
    shapes = {
        "visual_saliency": (ir.DataType.FLOAT, ("sequence",)),
        "visual_features": (dtype, ("sequence", feature_size)),
        "visual_grid": (ir.DataType.INT64, (2, "sequence")),
    }
    inputs += [Input(name, *shapes[name]) for name in prompt_inputs(chosen.values())]

    def trace(op: OpBuilder, values: dict[str, ir.Value]) -> list[tuple[str, ir.Value, tuple[int | str, ...]]]:
        last, cache, kept = stack(op, **values)
        outputs = [(LOGITS, _logits(op, head, last), (1, dims.vocab_size))]
        outputs += [(kept_name(i), value, (cache_length("sequence", i + 1),)) for i, value in enumerate(kept)]
        return outputs + _cache_outputs(
            dims, cache, 1, lambda layer: cache_length("sequence", stages_before(layer, prune_layers))
        )

    return build_model("prefill", inputs, trace)


def decode_model(
    dims: DecoderDims, dtype: ir.DataType, rotary: RotaryTables, *, prune_layers: Sequence[int]
) -> ir.Model:
    """Text tokens behind KV caches in, logits of the last ones and the grown caches out; no CAPA nodes.

    Inputs: inputs_embeds [B, S, D]; position_ids [axes, B, S], going on from the unpruned prompt; past_lengths
    [1 + stages, B], how many of the last rows of a cache are a prompt's own, in the layers before the first stage and
    behind each; past_key_values.l.key and .value [B, G, P_l, d]. Outputs: logits [B, V] FP32; present.l.key and .value.
    """
    stack = Decode(dims, dtype, rotary)
    head = Linear(dims.hidden_size, dims.vocab_size, dtype)
    head._set_name("lm_head")  # pyright: ignore[reportPrivateUsage]  # There is no public setter.
    inputs = [
        Input(INPUTS_EMBEDS, dtype, ("batch", "step", dims.hidden_size)),
        Input(POSITION_IDS, ir.DataType.INT64, (dims.position_axes, "batch", "step")),
        Input(PAST_LENGTHS, ir.DataType.INT64, (1 + len(prune_layers), "batch")),
    ]
    layers = range(dims.num_layers)
    for layer in layers:
        length = cache_length("past", stages_before(layer, prune_layers))
        shape = ("batch", dims.num_kv_heads, length, dims.head_dim)
        inputs += [Input(name, dtype, shape) for name in past_names(layer)]

    def trace(op: OpBuilder, values: dict[str, ir.Value]) -> list[tuple[str, ir.Value, tuple[int | str, ...]]]:
        fresh = [values[name] for name in (INPUTS_EMBEDS, POSITION_IDS, PAST_LENGTHS)]
        past = [(values[key], values[value]) for key, value in map(past_names, layers)]
        last, cache = stack(op, *fresh, past, [stages_before(i, prune_layers) for i in layers])
        outputs = [(LOGITS, _logits(op, head, last), ("batch", dims.vocab_size))]
        return outputs + _cache_outputs(
            dims, cache, "batch", lambda layer: cache_length("total", stages_before(layer, prune_layers))
        )

    return build_model("decode", inputs, trace)


def stages_before(layer: int, prune_layers: Sequence[int]) -> int:
    """How many stages have pruned what this layer caches."""
    return sum(prune_layer <= layer for prune_layer in prune_layers)


def _cache_outputs(
    dims: DecoderDims, cache: Sequence[KeyValue], batch: int | str, length: Callable[[int], str]
) -> list[tuple[str, ir.Value, tuple[int | str, ...]]]:
    return [
        (name, value, (batch, dims.num_kv_heads, length(layer), dims.head_dim))
        for layer, key_value in enumerate(cache)
        for name, value in zip(present_names(layer), key_value, strict=True)
    ]
