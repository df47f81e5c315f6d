"""The two decoder graphs over one set of weights: prefill with the CAPA nodes, and decode.

T = tokens, D = hidden size, H = query heads, G = KV heads, d = head size, X = text tokens, K = tokens kept.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir
from onnxscript import OpBuilder, nn

from capa_export.dims import DecoderDims
from capa_export.graph.build import Input, build_model, call
from capa_export.graph.layers import GatedMLP, Linear, RMSNorm, attention, heads_from_tokens, tokens_from_heads

__all__ = ["RotaryTables", "decode_model", "prefill_model"]

RotaryTables = Callable[[OpBuilder, ir.Value, ir.DataType], tuple[ir.Value, ir.Value]]
"""A family's position encoding: position ids -> cos and sin [1, T, d/2] in the given dtype."""


KeyValue = tuple[ir.Value, ir.Value]
"""Keys and values of one layer, each [1, G, T, d]."""

_END = 2**31 - 1
"""A slice end past any length."""


@dataclass(frozen=True)
class Tokens:
    """What travels down the prefill: the hidden states and all that must shrink with them."""

    hidden_TD: ir.Value
    cos_1Td: ir.Value
    sin_1Td: ir.Value
    text_rows_X: ir.Value | None
    """Rows of the hidden states that hold text; None where all of them do."""


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

    def project(
        self, op: OpBuilder, x_TD: ir.Value, cos: ir.Value, sin: ir.Value
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Rotated queries [1, H, T, d], rotated keys and plain values [1, G, T, d]."""
        dims = self.dims
        query = heads_from_tokens(op, self.q_proj(op, x_TD), dims.num_heads, dims.head_dim)
        key = heads_from_tokens(op, self.k_proj(op, x_TD), dims.num_kv_heads, dims.head_dim)
        value = heads_from_tokens(op, self.v_proj(op, x_TD), dims.num_kv_heads, dims.head_dim)
        return op.RotaryEmbedding(query, cos, sin), op.RotaryEmbedding(key, cos, sin), value

    def forward(
        self,
        op: OpBuilder,
        x_TD: ir.Value,
        cos: ir.Value,
        sin: ir.Value,
        past: KeyValue | None = None,
        mask: ir.Value | None = None,
    ) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value]:
        """Output [T, D], queries, and all keys and values."""
        query, key, value = self.project(op, x_TD, cos, sin)
        if past is not None:
            key, value = op.Concat(past[0], key, axis=2), op.Concat(past[1], value, axis=2)
        mixed = attention(op, query, key, value, self.dims.head_dim, mask=mask, causal=past is None)
        size = self.dims.num_heads * self.dims.head_dim
        return self.o_proj(op, tokens_from_heads(op, mixed, size)), query, key, value


class Prune(nn.Module):
    """Scores the visual tokens by what they contribute to the last prompt token, and drops all but the best."""

    def __init__(self, dims: DecoderDims) -> None:
        super().__init__()
        self.scale = dims.head_dim**-0.5

    def forward(
        self,
        op: OpBuilder,
        tokens: Tokens,
        query: ir.Value,
        key: ir.Value,
        value: ir.Value,
        output_weight: ir.Value,
        num_keep: ir.Value,
    ) -> tuple[Tokens, ir.Value, ir.Value, ir.Value]:
        """The surviving tokens, keys, values, and the kept rows [K], ascending."""
        assert tokens.text_rows_X is not None
        last_query = op.Slice(query, [-1], [_END], [2])
        scores_T = call(
            op, "ContributionScore", last_query, key, value, output_weight, tokens.text_rows_X, scale=self.scale
        )
        num_text = op.Shape(tokens.text_rows_X)
        kept_K = call(op, "TopKKeep", scores_T, op.Add(num_keep, num_text))

        def gather(x: ir.Value, axis: int) -> ir.Value:
            return call(op, "TokenGather", x, kept_K, axis=axis)

        zeros_T = op.Expand(op.Constant(value_ints=[0]), op.Shape(scores_T))
        is_kept_T = op.ScatterElements(
            zeros_T, kept_K, op.Expand(op.Constant(value_ints=[1]), op.Shape(kept_K)), axis=0
        )
        row_T = op.Sub(op.CumSum(is_kept_T, op.Constant(value_int=0)), op.Constant(value_int=1))
        survivors = Tokens(
            hidden_TD=gather(tokens.hidden_TD, 0),
            cos_1Td=gather(tokens.cos_1Td, 1),
            sin_1Td=gather(tokens.sin_1Td, 1),
            text_rows_X=op.Gather(row_T, tokens.text_rows_X, axis=0),
        )
        return survivors, gather(key, 2), gather(value, 2), kept_K


class Layer(nn.Module):
    """One decoder layer; its FFN may be a scale for visual tokens, and it may drop tokens after its attention."""

    def __init__(self, dims: DecoderDims, dtype: ir.DataType, *, linear: bool, prunes: bool) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(dims.hidden_size, dims.rms_norm_eps, dtype)
        self.self_attn = Attention(dims, dtype)
        self.prune = Prune(dims) if prunes else None
        self.post_attention_layernorm = RMSNorm(dims.hidden_size, dims.rms_norm_eps, dtype)
        self.mlp = GatedMLP(dims.hidden_size, dims.intermediate_size, dtype)
        self.visual_scale = nn.Parameter([dims.hidden_size], dtype) if linear else None

    def forward(
        self,
        op: OpBuilder,
        tokens: Tokens,
        *,
        num_keep: ir.Value | None = None,
        past: KeyValue | None = None,
        mask: ir.Value | None = None,
    ) -> tuple[Tokens, KeyValue, ir.Value | None]:
        """Tokens after the layer, its keys and values, and the kept rows if it prunes."""
        normed_TD = self.input_layernorm(op, tokens.hidden_TD)
        mixed_TD, query, key, value = self.self_attn(op, normed_TD, tokens.cos_1Td, tokens.sin_1Td, past, mask)
        tokens = replace(tokens, hidden_TD=op.Add(tokens.hidden_TD, mixed_TD))
        kept_K = None
        if self.prune is not None:
            weight = self.self_attn.o_proj.weight
            tokens, key, value, kept_K = self.prune(op, tokens, query, key, value, weight, num_keep)
        if self.visual_scale is None:
            return replace(tokens, hidden_TD=self._ffn(op, tokens.hidden_TD)), (key, value), kept_K
        assert tokens.text_rows_X is not None
        text_XD = self._ffn(op, op.Gather(tokens.hidden_TD, tokens.text_rows_X, axis=0))
        scaled_TD = call(op, "VisualScale", tokens.hidden_TD, self.visual_scale, text_XD, tokens.text_rows_X)
        return replace(tokens, hidden_TD=scaled_TD), (key, value), kept_K

    def _ffn(self, op: OpBuilder, x_TD: ir.Value) -> ir.Value:
        """x + FFN(norm(x))."""
        return op.Add(x_TD, self.mlp(op, self.post_attention_layernorm(op, x_TD)))


class Model(nn.Module):
    """The decoder stack, for a whole prompt or, given `past`, for text tokens behind a KV cache."""

    def __init__(
        self,
        dims: DecoderDims,
        dtype: ir.DataType,
        rotary: RotaryTables,
        *,
        prune_layers: Sequence[int] = (),
        linear_layers: Sequence[int] = (),
    ) -> None:
        super().__init__("model")
        self.dtype, self.rotary = dtype, rotary
        self.layers = nn.ModuleList(
            [Layer(dims, dtype, linear=i in linear_layers, prunes=i in prune_layers) for i in range(dims.num_layers)]
        )
        self.norm = RMSNorm(dims.hidden_size, dims.rms_norm_eps, dtype)

    def forward(
        self,
        op: OpBuilder,
        inputs_embeds: ir.Value,
        position_ids: ir.Value,
        *,
        text_positions: ir.Value | None = None,
        num_keep: ir.Value | None = None,
        past: Sequence[KeyValue] | None = None,
    ) -> tuple[ir.Value, list[KeyValue], list[ir.Value]]:
        """Normed hidden state of the last token [1, D], keys and values per layer, kept rows per stage."""
        cos, sin = self.rotary(op, position_ids, self.dtype)
        tokens = Tokens(op.Squeeze(inputs_embeds, [0]), cos, sin, text_positions)
        cache: list[KeyValue] = []
        kept: list[ir.Value] = []
        masks: dict[str, ir.Value] = {}
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            options: dict[str, Any] = {}
            if past is not None:
                shape = past[index][0].shape
                assert shape is not None
                length = str(shape[2])
                if length not in masks:
                    masks[length] = _append_mask(op, tokens.hidden_TD, past[index][0], self.dtype)
                options = {"past": past[index], "mask": masks[length]}
            elif layer.prune is not None:
                options = {"num_keep": op.Slice(num_keep, [len(kept)], [len(kept) + 1], [0])}
            tokens, key_value, kept_K = layer(op, tokens, **options)
            cache.append(key_value)
            kept += [kept_K] if kept_K is not None else []
        return self.norm(op, op.Slice(tokens.hidden_TD, [-1], [_END], [0])), cache, kept


def _append_mask(op: OpBuilder, x_TD: ir.Value, past_key: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Additive causal mask [1, 1, T, L] of T new tokens behind L - T cached ones."""
    num_new = op.Shape(x_TD, start=0, end=1)
    num_past = op.Shape(past_key, start=2, end=3)
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    last_seen_T = op.Add(op.Range(zero, op.Squeeze(num_new, [0]), one), num_past)
    key_L = op.Range(zero, op.Squeeze(op.Add(num_past, num_new), [0]), one)
    hidden_TL = op.Greater(op.Unsqueeze(key_L, [0]), op.Unsqueeze(last_seen_T, [1]))
    lowest, none = (op.Cast(op.Constant(value_float=value), to=dtype) for value in (-65504.0, 0.0))
    return op.Unsqueeze(op.Where(hidden_TL, lowest, none), [0, 1])


def _logits(op: OpBuilder, head: Linear, x_1D: ir.Value) -> ir.Value:
    return op.Cast(head(op, x_1D), to=ir.DataType.FLOAT)


def prefill_model(
    dims: DecoderDims,
    dtype: ir.DataType,
    rotary: RotaryTables,
    *,
    prune_layers: Sequence[int],
    linear_layers: Sequence[int],
) -> ir.Model:
    """Whole prompt in, logits of the last position, KV cache and kept positions out (CAPA, sections 4.1 and 4.2).

    Inputs: inputs_embeds [1, T, D]; position_ids [axes, T]; text_positions [X], the rows that hold text, ascending and
    never dropped; num_keep [stages], the visual tokens each stage keeps. Outputs: logits [1, V] FP32;
    kept_positions.i [K_i], ascending prompt positions that survive stage i; present.l.key and .value [1, G, T_l, d].
    """
    stack = Model(dims, dtype, rotary, prune_layers=prune_layers, linear_layers=linear_layers)
    head = Linear(dims.hidden_size, dims.vocab_size, dtype)
    head._set_name("lm_head")  # pyright: ignore[reportPrivateUsage]  # There is no public setter.
    inputs = [
        Input("inputs_embeds", dtype, (1, "sequence", dims.hidden_size)),
        Input("position_ids", ir.DataType.INT64, (dims.position_axes, "sequence")),
        Input("text_positions", ir.DataType.INT64, ("text",)),
    ]
    if prune_layers:
        inputs.append(Input("num_keep", ir.DataType.INT64, (len(prune_layers),)))

    def trace(op: OpBuilder, values: dict[str, ir.Value]) -> list[tuple[str, ir.Value, tuple[int | str, ...]]]:
        embeds, positions = values.pop("inputs_embeds"), values.pop("position_ids")
        last, cache, rows = stack(op, embeds, positions, **values)
        # A later stage numbers its rows within what the earlier ones kept.
        kept: list[ir.Value] = []
        for row_K in rows:
            kept.append(op.Gather(kept[-1], row_K, axis=0) if kept else row_K)
        outputs = [("logits", _logits(op, head, last), (1, dims.vocab_size))]
        outputs += [(f"kept_positions.{i}", value, (f"kept_{i}",)) for i, value in enumerate(kept)]
        return outputs + _cache_outputs(
            dims, cache, lambda layer: cache_length(layer, prune_layers, "sequence", "kept")
        )

    return build_model("prefill", inputs, trace)


def decode_model(
    dims: DecoderDims, dtype: ir.DataType, rotary: RotaryTables, *, prune_layers: Sequence[int]
) -> ir.Model:
    """Text tokens behind a KV cache in, logits of the last one and the grown cache out; no CAPA nodes.

    Inputs: inputs_embeds [1, S, D]; position_ids [axes, S], going on from the unpruned prompt;
    past_key_values.l.key and .value [1, G, P_l, d]. Outputs: logits [1, V] FP32; present.l.key and .value.
    """
    stack = Model(dims, dtype, rotary)
    head = Linear(dims.hidden_size, dims.vocab_size, dtype)
    head._set_name("lm_head")  # pyright: ignore[reportPrivateUsage]  # There is no public setter.
    inputs = [
        Input("inputs_embeds", dtype, (1, "step", dims.hidden_size)),
        Input("position_ids", ir.DataType.INT64, (dims.position_axes, "step")),
    ]
    for layer in range(dims.num_layers):
        length = cache_length(layer, prune_layers, "past", "past_kept")
        shape = (1, dims.num_kv_heads, length, dims.head_dim)
        inputs += [Input(f"past_key_values.{layer}.{part}", dtype, shape) for part in ("key", "value")]

    def trace(op: OpBuilder, values: dict[str, ir.Value]) -> list[tuple[str, ir.Value, tuple[int | str, ...]]]:
        past = [
            (values[f"past_key_values.{layer}.key"], values[f"past_key_values.{layer}.value"])
            for layer in range(dims.num_layers)
        ]
        last, cache, _ = stack(op, values["inputs_embeds"], values["position_ids"], past=past)
        outputs = [("logits", _logits(op, head, last), (1, dims.vocab_size))]
        return outputs + _cache_outputs(
            dims, cache, lambda layer: cache_length(layer, prune_layers, "total", "total_kept")
        )

    return build_model("decode", inputs, trace)


def cache_length(layer: int, prune_layers: Sequence[int], full: str, kept: str) -> str:
    """Name of the dimension that holds a layer's KV length: `full` before the first stage, then `kept_<stage>`."""
    stage = sum(prune_layer <= layer for prune_layer in prune_layers)
    return f"{kept}_{stage - 1}" if stage else full


def _cache_outputs(
    dims: DecoderDims, cache: Sequence[KeyValue], length: Callable[[int], str]
) -> list[tuple[str, ir.Value, tuple[int | str, ...]]]:
    return [
        (f"present.{layer}.{part}", value, (1, dims.num_kv_heads, length(layer), dims.head_dim))
        for layer, key_value in enumerate(cache)
        for part, value in zip(("key", "value"), key_value, strict=True)
    ]
