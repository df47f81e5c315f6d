"""The graphs that onnxruntime-genai runs: the prompt with its pictures, token embedding, one decoder for both phases.

genai counts positions itself, one after the other, and hands nothing from graph to graph but embeddings and caches. So
each row of embeddings is followed by how far its position lies behind the one before, per axis, and by whether it is
visual; the decoder adds the steps up, and keeps them as the cache of one layer more.

T = prompt tokens, S = rows that enter the decoder, N = visual tokens, X = text tokens, A = position axes,
D = hidden size, R = D + A + 1, P = cached rows.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import OpBuilder, nn

from capa_export.base.dims import DecoderDims, ModelDims
from capa_export.base.precision import FP16_MAX
from capa_export.graph.build import END, Input, Output, build_model
from capa_export.graph.contract import IMAGE_FEATURES, INPUTS_EMBEDS, LOGITS, PIXEL_VALUES, past_names, present_names
from capa_export.graph.decoder import Layer, RotaryTables, Stack
from capa_export.graph.layers import Linear
from capa_export.graph.prune import Prune
from capa_export.graph.tokens import KeyValue, Tokens
from capa_export.selectors.selector import TOWER_OUTPUTS, SelectorChoice

__all__ = ["TABLE", "decoder_model", "embedding_model", "prompt_model", "row_size"]

TABLE = "embed_tokens.weight"
"""Initializer that holds the token embedding [V, D]."""

_BASE = 256.0
"""Steps are cached as two digits, each of which every dtype of a cache holds exactly."""
_PIXELS = "pixels"


def row_size(dims: DecoderDims) -> int:
    """R, numbers in a row of embeddings."""
    return dims.hidden_size + dims.position_axes + 1


class Embedding(nn.Module):
    """The token embedding."""

    def __init__(self, dims: DecoderDims, dtype: ir.DataType) -> None:
        super().__init__("embed_tokens")
        self.weight = nn.Parameter([dims.vocab_size, dims.hidden_size], dtype)

    def forward(self, op: OpBuilder, token_ids_T: ir.Value) -> ir.Value:
        return op.Gather(self.weight, token_ids_T, axis=0)


class PromptRows(nn.Module):
    """The prompt's rows, those of the dropped visual tokens left out."""

    def __init__(self, dims: ModelDims[Any], chosen: SelectorChoice | None, min_keep_per_image: int) -> None:
        super().__init__("prompt")
        self.dims = dims
        self.prune = None if chosen is None else Prune(dims.decoder, chosen, min_keep_per_image)

    def forward(self, op: OpBuilder, embeds_TD: ir.Value, values: dict[str, ir.Value]) -> ir.Value:
        """[S, R] FP32, from the embeddings of all tokens as if they were text, and the inputs."""
        token_ids_T, pixel_values = values["prompt_ids"], values[PIXEL_VALUES]
        is_visual_T = op.Equal(token_ids_T, op.Constant(value_int=self.dims.image_token_id))
        visual_rows_N1 = op.Transpose(op.NonZero(is_visual_T))
        text_rows_X = op.Squeeze(op.NonZero(op.Not(is_visual_T)), [0])

        hidden_TD = op.ScatterND(embeds_TD, visual_rows_N1, values[IMAGE_FEATURES])
        position_TA = op.Cast(self._positions(op, is_visual_T, pixel_values), to=ir.DataType.FLOAT)
        visual_T1 = op.Unsqueeze(op.Cast(is_visual_T, to=ir.DataType.FLOAT), [1])
        if self.prune is not None:
            # As a runtime has it of a whole prompt: zero where text stands.
            num_tokens = op.Shape(token_ids_T)
            prompted: dict[str, ir.Value] = {}
            for name in self.prune.selector.reads:
                of_visual = values[TOWER_OUTPUTS[name]]
                prompted[name] = op.ScatterND(_zeros_like(op, of_visual, num_tokens), visual_rows_N1, of_visual)
            # Positions and marks go the way of the tables that are gathered along with the hidden states.
            tokens = Tokens(hidden_TD, op.Unsqueeze(position_TA, [0]), op.Unsqueeze(visual_T1, [0]), text_rows_X)
            num_keep = op.Sub(values["num_image_tokens"], op.Shape(text_rows_X))
            tokens, _ = self.prune(op, tokens, num_keep, prompted)
            hidden_TD = tokens.hidden_TD
            position_TA, visual_T1 = op.Squeeze(tokens.cos_BTd, [0]), op.Squeeze(tokens.sin_BTd, [0])
        axes = self.dims.decoder.position_axes
        start_1A = op.Constant(value=ir.tensor(np.full((1, axes), -1, np.float32)))
        before_SA = op.Concat(start_1A, op.Slice(position_TA, [0], [-1], [0]), axis=0)
        hidden_SD = op.Cast(hidden_TD, to=ir.DataType.FLOAT)
        return op.Concat(hidden_SD, op.Sub(position_TA, before_SA), visual_T1, axis=1)

    def _positions(self, op: OpBuilder, is_visual_T: ir.Value, pixel_values: ir.Value) -> ir.Value:
        """[T, A] int64; with three axes, those of pictures whose grid is the shape of `pixel_values` [N, R, C, ...]."""
        zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
        row_T = op.Range(zero, op.Squeeze(op.Shape(is_visual_T), [0]), one)
        if self.dims.decoder.position_axes == 1:
            return op.Unsqueeze(row_T, [1])
        num_rows, num_cols = (op.Shape(pixel_values, start=axis, end=axis + 1) for axis in (1, 2))
        visual_T = op.Cast(is_visual_T, to=ir.DataType.INT64)
        visual_before_T = op.CumSum(visual_T, zero, exclusive=1)
        size = op.Mul(num_rows, num_cols)
        pictures_before_T = op.Div(visual_before_T, size)
        within_T = op.Sub(visual_before_T, op.Mul(pictures_before_T, size))
        text_before_T = op.Sub(row_T, visual_before_T)
        base_T = op.Add(text_before_T, op.Mul(pictures_before_T, op.Max(num_rows, num_cols)))
        grid_row_T = op.Div(within_T, num_cols)
        grid_col_T = op.Sub(within_T, op.Mul(grid_row_T, num_cols))
        offsets = (op.Mul(visual_T, grid_row_T), op.Mul(visual_T, grid_col_T))
        columns = (base_T, *(op.Add(base_T, offset) for offset in offsets))
        return op.Concat(*(op.Unsqueeze(column, [1]) for column in columns), axis=1)


def _zeros_like(op: OpBuilder, of_each_token: ir.Value, num_tokens: ir.Value) -> ir.Value:
    """Zeros for T tokens of what there is for N of them."""
    zero = op.CastLike(op.Constant(value_float=0.0), of_each_token)
    return op.Expand(zero, op.Concat(num_tokens, op.Shape(of_each_token, start=1), axis=0))


def prompt_model(
    tower: ir.Model, dims: ModelDims[Any], dtype: ir.DataType, chosen: SelectorChoice | None, *, min_keep_per_image: int
) -> ir.Model:
    """A prompt and its pictures in, the rows that enter the decoder out; genai runs it as its vision model.

    Inputs: prompt_ids [T] int64, a placeholder for every visual token; pixel_values FP32, as the tower has it, of all
    pictures; with a selection, num_image_tokens [1] int64, the S rows to return. Output: prompt_embeds [S, R] FP32.

    Args:
        tower: the vision graph, whose nodes move into the new one.
        dims: of the model.
        dtype: of the graphs.
        chosen: what chooses the visual tokens; None for all of them.
        min_keep_per_image: as in the prefill graph.
    """
    size = row_size(dims.decoder)
    inputs = [
        Input("prompt_ids", ir.DataType.INT64, ("sequence",)),
        replace(_as_input(tower.graph.inputs[0]), dtype=ir.DataType.FLOAT),
    ]
    if chosen is not None:
        inputs.append(Input("num_image_tokens", ir.DataType.INT64, (1,)))
    seen = [_as_input(value) for value in tower.graph.outputs]
    table, rows = Embedding(dims.decoder, dtype), PromptRows(dims, chosen, min_keep_per_image)

    def trace(op: OpBuilder, values: dict[str, ir.Value]) -> list[Output]:
        embeds_SR = rows(op, table(op, values["prompt_ids"]), values)
        return [("prompt_embeds", embeds_SR, ("rows", size)), (_PIXELS, op.Cast(values[PIXEL_VALUES], to=dtype), ())]

    model = build_model("prompt", [*inputs, *seen], trace)
    _take_in(tower, model)
    return model


def _as_input(value: ir.Value) -> Input:
    assert value.name is not None and value.dtype is not None and value.shape is not None
    sizes = (size if isinstance(size, int) else str(size.value) for size in value.shape)
    return Input(value.name, value.dtype, tuple(sizes))


def _take_in(tower: ir.Model, model: ir.Model) -> None:
    """Put a tower between the pixels that a model returns and the features that it takes."""
    inside, graph = tower.graph, model.graph
    model.functions.update(tower.functions)
    nodes, initializers = list(inside), list(inside.initializers.values())
    inside.remove(nodes)
    inside.initializers.clear()
    for value in initializers:
        if not isinstance(value.const_value, ir.ExternalTensor):
            value.name = f"visual/{value.name}"
        graph.register_initializer(value)
    pixels = graph.outputs.pop()
    ir.convenience.replace_all_uses_with(inside.inputs[0], pixels)
    taken = {value.name: value for value in graph.inputs}
    for value in inside.outputs:
        feature = taken[value.name]
        ir.convenience.replace_all_uses_with(feature, value)
        graph.inputs.remove(feature)
    inside.outputs.clear()
    graph.extend(nodes)
    graph.sort()


def embedding_model(dims: DecoderDims, dtype: ir.DataType) -> ir.Model:
    """Token ids in, rows out: the prompt's as they come, and each token behind them one position further.

    Inputs: input_ids [1, T] int64; prompt_embeds [S, R] FP32, empty but for a prompt with pictures. Output:
    inputs_embeds [1, T, R] FP32.
    """
    size, table = row_size(dims), Embedding(dims, dtype)
    marks = np.array([[1] * dims.position_axes + [0]], np.float32)
    inputs = [
        Input("input_ids", ir.DataType.INT64, (1, "sequence")),
        Input("prompt_embeds", ir.DataType.FLOAT, ("rows", size)),
    ]

    def trace(op: OpBuilder, values: dict[str, ir.Value]) -> list[Output]:
        prompt_SR = values["prompt_embeds"]
        new_ids = op.Slice(op.Squeeze(values["input_ids"], [0]), op.Shape(prompt_SR, start=0, end=1), [END], [0])
        new_TD = op.Cast(table(op, new_ids), to=ir.DataType.FLOAT)
        rows = op.Concat(op.Shape(new_ids), op.Constant(value_ints=[marks.size]), axis=0)
        new_TR = op.Concat(new_TD, op.Expand(op.Constant(value=ir.tensor(marks)), rows), axis=1)
        embeds_1TR = op.Unsqueeze(op.Concat(prompt_SR, new_TR, axis=0), [0])
        return [(INPUTS_EMBEDS, embeds_1TR, (1, "sequence", size))]

    return build_model("embedding", inputs, trace)


class Rows(Stack):
    """The stack on rows behind a cache, which is empty before the prompt."""

    def forward(
        self, op: OpBuilder, rows_SR: ir.Value, past: Sequence[KeyValue], past_steps: KeyValue
    ) -> tuple[ir.Value, list[KeyValue], KeyValue]:
        """Normed hidden state of the last row [1, D], the grown cache, and the grown cache of steps."""
        dims = self.dims
        ends = [dims.hidden_size, dims.hidden_size + dims.position_axes, END]
        hidden, step_SA, visual = (
            op.Slice(rows_SR, [start], [end], [1]) for start, end in zip([0, *ends], ends, strict=False)
        )
        high_SA = op.Floor(op.Mul(step_SA, 1 / _BASE))
        low_SA = op.Sub(step_SA, op.Mul(high_SA, _BASE))
        digits = (high_SA, low_SA)
        steps = tuple(
            op.Concat(before, op.Unsqueeze(op.Cast(digit, to=self.dtype), [0, 1]), axis=2)
            for before, digit in zip(past_steps, digits, strict=True)
        )
        high_A, low_A = (
            op.ReduceSum(op.Cast(part, to=ir.DataType.FLOAT), [0, 1, 2], keepdims=0) for part in past_steps
        )
        reached_A = op.Sub(op.Add(op.Mul(high_A, _BASE), low_A), 1.0)
        position_SA = op.Add(op.CumSum(step_SA, op.Constant(value_int=0)), reached_A)
        position_AS = op.Cast(op.Transpose(position_SA, perm=[1, 0]), to=ir.DataType.INT64)
        cos, sin = self.rotary(op, position_AS, self.dtype)
        text_rows_X = None
        if any(isinstance(layer, Layer) and layer.visual_scale is not None for layer in self.layers):
            text_rows_X = op.Squeeze(op.NonZero(op.Not(op.Cast(op.Squeeze(visual, [1]), to=ir.DataType.BOOL))), [0])
        tokens = Tokens(op.Cast(hidden, to=self.dtype), cos, sin, text_rows_X)
        mask = _causal(op, op.Shape(past[0][0], start=2, end=3), op.Shape(rows_SR, start=0, end=1), self.dtype)
        cache: list[KeyValue] = []
        for layer, key_value in zip(self.layers, past, strict=True):
            assert isinstance(layer, Layer)
            tokens, grown, _ = layer(op, tokens, past=key_value, mask=mask)
            cache.append(grown)
        return self.norm(op, op.Slice(tokens.hidden_TD, [-1], [END], [0])), cache, steps


class Decoder(nn.Module):
    """The stack and the LM head."""

    def __init__(
        self, dims: DecoderDims, dtype: ir.DataType, rotary: RotaryTables, linear_layers: Sequence[int]
    ) -> None:
        super().__init__()
        self.model = Rows(dims, dtype, rotary, linear_layers=linear_layers)
        self.lm_head = Linear(dims.hidden_size, dims.vocab_size, dtype)

    def forward(
        self, op: OpBuilder, rows_SR: ir.Value, past: Sequence[KeyValue], past_steps: KeyValue
    ) -> tuple[ir.Value, list[KeyValue], KeyValue]:
        """Logits [1, 1, V] FP32, and the caches as of `Rows`."""
        last_1D, cache, steps = self.model(op, rows_SR, past, past_steps)
        return op.Unsqueeze(op.Cast(self.lm_head(op, last_1D), to=ir.DataType.FLOAT), [0]), cache, steps


def _causal(op: OpBuilder, num_past: ir.Value, num_new: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Additive mask [S, P + S]: a row sees what is cached and no later row."""
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    row_S = op.Add(op.Range(zero, op.Squeeze(num_new, [0]), one), num_past)
    key_L = op.Range(zero, op.Squeeze(op.Add(num_past, num_new), [0]), one)
    later_SL = op.Greater(op.Unsqueeze(key_L, [0]), op.Unsqueeze(row_S, [1]))
    lowest, none = (op.Cast(op.Constant(value_float=value), to=dtype) for value in (-FP16_MAX, 0.0))
    return op.Where(later_SL, lowest, none)


def decoder_model(
    dims: DecoderDims, dtype: ir.DataType, rotary: RotaryTables, *, linear_layers: Sequence[int]
) -> ir.Model:
    """Rows in, logits of the last one and the grown caches out.

    Inputs: past_key_values.l.key and .value [1, G, P, d] of every layer, and [1, 1, P, A] of one more, the steps;
    inputs_embeds [1, S, R] FP32. Outputs: logits [1, 1, V] FP32; present.l.key and .value.
    """
    decoder = Decoder(dims, dtype, rotary, linear_layers)
    shapes = [(dims.num_kv_heads, dims.head_dim)] * dims.num_layers + [(1, dims.position_axes)]

    inputs = [
        Input(name, dtype, (1, heads, "past", size))
        for layer, (heads, size) in enumerate(shapes)
        for name in past_names(layer)
    ]
    inputs.append(Input(INPUTS_EMBEDS, ir.DataType.FLOAT, (1, "sequence", row_size(dims))))

    def trace(op: OpBuilder, values: dict[str, ir.Value]) -> list[Output]:
        *past, past_steps = ((values[key], values[value]) for key, value in map(past_names, range(len(shapes))))
        logits, cache, steps = decoder(op, op.Squeeze(values[INPUTS_EMBEDS], [0]), past, past_steps)
        outputs: list[Output] = [(LOGITS, logits, (1, 1, dims.vocab_size))]
        for layer, (key_value, (heads, size)) in enumerate(zip([*cache, steps], shapes, strict=True)):
            parts = zip(present_names(layer), key_value, strict=True)
            outputs += [(name, part, (1, heads, "total", size)) for name, part in parts]
        return outputs

    return build_model("decoder", inputs, trace)
