"""Faults of attention, positions and the cache."""

# Shapes: T tokens, K tokens kept, X text tokens, H query heads, G KV heads, d head size.

import numpy as np
import onnx_ir as ir

from tests.parity.graph_faults.edit import (
    Tape,
    gemm,
    input_of,
    later_layer,
    limited,
    node_called,
    nodes_of,
    num_layers,
    replace,
    set_weight,
)

__all__ = [
    "attention_scale_off",
    "cache_hidden",
    "causal_mask_lost",
    "frequencies_off",
    "heads_swapped",
    "kv_group_off_by_one",
    "last_causal_mask_lost",
    "mrope_rows_swapped",
    "output_weight_transposed",
    "positions_from_pruned_length",
]


def _attention(model: ir.Model) -> ir.Node:
    return node_called(model, f"model/layers.{later_layer(model)}/self_attn/Attention")


def _cache_size(model: ir.Model) -> tuple[int, int]:
    """G and d."""
    shape = next(value.shape for value in model.graph.outputs if value.name == "present.0.key")
    assert shape is not None
    groups, size = shape[1], shape[3]
    assert isinstance(groups, int) and isinstance(size, int)
    return groups, size


def heads_swapped(model: ir.Model, size: float) -> str:
    """The first two heads' first channels change places."""
    weight, place = gemm(model, "self_attn.o_proj")
    _, head = _cache_size(model)

    def swap(array: np.ndarray) -> np.ndarray:
        count = limited(size, head)
        order = np.arange(array.shape[1])
        order[:count], order[head : head + count] = np.arange(head, head + count), np.arange(count)
        return array[:, order]

    set_weight(model, weight, swap)
    return place


def output_weight_transposed(model: ir.Model, size: float) -> str:
    """A square of it."""
    weight, place = gemm(model, "self_attn.o_proj")

    def transpose(array: np.ndarray) -> np.ndarray:
        count = limited(size, min(array.shape))
        array[:count, :count] = array[:count, :count].T.copy()
        return array

    set_weight(model, weight, transpose)
    return place


def kv_group_off_by_one(model: ir.Model, size: float) -> str:
    """Every query head reads the first channels of the next group."""
    node = _attention(model)
    groups, head = _cache_size(model)
    order = np.roll(np.arange(groups), -1)
    for index in (1, 2):
        tape = Tape()
        rolled = tape.op("Gather", [input_of(node, index), tape.array(order)], {"axis": 1})
        first = tape.array(np.arange(head) < size)
        wrong = tape.op("Where", [first, rolled, input_of(node, index)])
        model.graph.insert_before(node, tape.nodes)
        node.replace_input_with(index, wrong)
    return str(node.name)


def causal_mask_lost(model: ir.Model, size: float, layer: int | None = None) -> str:
    """Every token sees so many of those behind it."""
    name = f"layers.{later_layer(model) if layer is None else layer}"
    node = node_called(model, f"model/{name}/self_attn/Attention")
    tape = Tape()
    length = tape.op("Squeeze", [tape.op("Shape", [input_of(node, 1)], {"start": 2, "end": 3}), tape.ints(0)])
    zero, one = tape.array(np.array(0)), tape.array(np.array(1))
    index = tape.op("Range", [zero, length, one])
    last = tape.op("Add", [tape.op("Unsqueeze", [index, tape.ints(1)]), tape.array(np.array(int(min(size, 2**31))))])
    seen = tape.op("LessOrEqual", [tape.op("Unsqueeze", [index, tape.ints(0)]), last])
    model.graph.insert_before(node, tape.nodes)
    node.resize_inputs(4)
    node.replace_input_with(3, seen)
    node.attributes["is_causal"] = ir.AttrInt64("is_causal", 0)
    return str(node.name)


def last_causal_mask_lost(model: ir.Model, size: float) -> str:
    return causal_mask_lost(model, size, num_layers(model) - 1)


def attention_scale_off(model: ir.Model, size: float) -> str:
    node = _attention(model)
    scale = node.attributes["scale"].as_float()
    node.attributes["scale"] = ir.AttrFloat32("scale", scale * (1 + size))
    return str(node.name)


def mrope_rows_swapped(model: ir.Model, size: float) -> str:
    """Height and width of the first of their frequencies."""
    gather = next(nodes_of(model, "Gather"))
    constant = input_of(gather, 1).producer()
    assert constant is not None
    axis = constant.attributes["value"].as_tensor().numpy().copy()
    spatial = np.flatnonzero(axis)
    # One frequency of either axis in turn, so that a small fault has some of both.
    turns = np.concatenate([*zip(spatial[axis[spatial] == 1], spatial[axis[spatial] == 2], strict=True)])
    chosen = turns[: limited(size, len(turns))]
    axis[chosen] = 3 - axis[chosen]
    constant.attributes["value"] = ir.AttrTensor("value", ir.tensor(axis))
    return str(gather.name)


def frequencies_off(model: ir.Model, size: float) -> str:
    """All angles too large by a share."""
    angle = next(nodes_of(model, "Mul"))
    constant = input_of(angle, 1).producer()
    assert constant is not None
    frequency = constant.attributes["value"].as_tensor().numpy()
    constant.attributes["value"] = ir.AttrTensor("value", ir.tensor((frequency * (1 + size)).astype(np.float32)))
    return str(angle.name)


def positions_from_pruned_length(model: ir.Model, size: float) -> str:
    """The answer's positions go on from what the last stage left."""
    inputs = {value.name: value for value in model.graph.inputs}
    lengths, reader = inputs["past_lengths"], next(iter(inputs["position_ids"].uses())).node

    def make(op: Tape, positions: ir.Value) -> ir.Value:
        before, after = (op.op("Gather", [lengths, op.ints(stage)], {"axis": 0}) for stage in (0, -1))
        dropped = op.op("Min", [op.op("Sub", [before, after]), op.array(np.array(int(min(size, 2**31))))])
        return op.op("Sub", [positions, op.op("Unsqueeze", [dropped, op.ints(2)])])

    replace(model.graph, inputs["position_ids"], make)
    return str(reader.name)


def cache_hidden(model: ir.Model, size: float) -> str:
    """Decode does not see the first cached rows."""
    node = next(nodes_of(model, "Sub"))
    replace(model.graph, node.outputs[0], lambda op, padding: op.op("Add", [padding, op.ints(int(size))]))
    return str(node.name)
