"""Makes of prefill a graph that is decode as well, for engines that hold weights once where these cannot be inputs.

B = batch, H = query heads, G = KV heads, N = blocks, W = rows of a block, T = tokens, d = head size.
"""

from collections.abc import Iterable, Mapping

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from capa_export.graph.contract import (
    CACHE_ROWS,
    PAST_LENGTHS,
    block_count,
    cache_length,
    cache_stages,
    is_present,
    past_names,
    present_names,
)
from capa_export.passes.behind_cache import heads_of, text_behind_cache
from capa_export.passes.stand_ins import replace_by_bodies

__all__ = ["JoinDecodePass", "filled"]

# Behind an empty cache a token's own part counts 1 and what the cache gives is 0, for every token of a prompt; a single
# token's own part is its value.
_ATTENTION = """
Attention (own, query, past_key, past_value, key, past_lengths) => (y) {{
    token_axis = Constant <value_ints = [2]> ()
    newest = Constant <value_ints = [-1]> ()
    behind_all = Constant <value_ints = [9223372036854775807]> ()
    query_last = Slice (query, newest, behind_all, token_axis)
    key_last = Slice (key, newest, behind_all, token_axis)
    {behind_cache}
    per_head = Constant <value_ints = [0, {heads}, 1, 1]> ()
    weight_BH11 = Reshape (weight_BGr1, per_head)
    rows_of_heads = Constant <value_ints = [0, {heads}, 1, {head_size}]> ()
    past_mixed_BH1d = Reshape (past_mixed_BGrd, rows_of_heads)
    own_wide = Cast <to = 1> (own)
    weighted_BHTd = Mul (own_wide, weight_BH11)
    mixed_BHTd = Add (weighted_BHTd, past_mixed_BH1d)
    y = CastLike (mixed_BHTd, own)
}}
"""


class JoinDecodePass(ir.passes.InPlacePass):
    """Lets prefill read caches [1, G, N, W, d] of which `past_lengths` rows count, as decode for engines does.

    A prompt runs behind caches of which no row counts. A token of an answer is a prompt of one, which is text: its
    keys and values come out as a prompt's do, for whoever runs it to write them behind the others.

    Requires that prefill's Attention nodes are its layers' in their order, with queries that are scaled already.
    Ensures that the inputs of prefill stay, and those of decode that it lacks come behind them. A second run changes
    nothing.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        if any(value.name == PAST_LENGTHS for value in graph.inputs):
            return ir.passes.PassResult(model, modified=False)
        presents = {str(value.name): value for value in graph.outputs if is_present(str(value.name))}
        attentions = [node for node in graph if node.op_type == "Attention"]
        assert len(presents) == 2 * len(attentions)
        # For the numbers of heads.
        ShapeInferencePass()(model)
        stages = 1 + max(cache_stages(_length(value)) for value in presents.values())
        lengths = _input(PAST_LENGTHS, ir.DataType.INT64, (stages, 1))
        added = [lengths]
        bodies: dict[ir.Node, str] = {}
        for layer, node in enumerate(attentions):
            heads, groups, head_size = heads_of(node)
            present = presents[present_names(layer)[0]]
            length, dtype = _length(present), present.dtype
            query, key = node.inputs[0], node.inputs[1]
            assert dtype is not None and query is not None
            blocks = block_count(cache_length("past", cache_stages(length)))
            past = [_input(name, dtype, (1, groups, blocks, CACHE_ROWS, head_size)) for name in past_names(layer)]
            added += past
            own = ir.Value(name=f"{node.name}/own", type=node.outputs[0].type, shape=node.outputs[0].shape)
            joined = ir.node(
                "Attention",
                [own, query, *past, key, lengths],
                name=f"{str(node.name).rpartition('/')[0]}/joined",
                outputs=[ir.Value(name=node.outputs[0].name, type=own.type, shape=own.shape)],
            )
            node.outputs[0].replace_all_uses_with(joined.outputs[0])
            node.outputs[0].name = own.name
            joined.replace_input_with(0, node.outputs[0])
            graph.insert_after(node, joined)
            narrow = query.dtype == dtype
            behind_cache = text_behind_cache(node, length, query="query_last", key="key_last", narrow=narrow)
            bodies[joined] = _ATTENTION.format(behind_cache=behind_cache, heads=heads, head_size=head_size)
        graph.inputs.extend(added)
        replace_by_bodies(model, bodies, graph.opset_imports[""])
        return ir.passes.PassResult(model, modified=True)


def filled(values: Iterable[ir.Value], arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays of a run of prefill, or of one prompt's step, as the joined graph has them.

    Args:
        values: inputs or outputs of the joined graph.
        arrays: of the run, by their names; all others are zeros of the smallest shape.
    """
    filled: dict[str, np.ndarray] = {}
    for value in values:
        assert value.name is not None and value.shape is not None and value.dtype is not None
        least = tuple(size if isinstance(size, int) else 1 for size in value.shape)
        array = arrays.get(value.name)
        if array is None:
            array = np.zeros(least, value.dtype.numpy())
        # Positions of a step have a batch.
        filled[value.name] = array.reshape(*array.shape[: len(least) - 1], -1)
    return filled


def _length(present: ir.Value) -> str:
    assert present.shape is not None
    length = present.shape[2]
    assert isinstance(length, ir.SymbolicDim)
    return str(length.value)


def _input(name: str, dtype: ir.DataType, shape: tuple[int | str, ...]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
