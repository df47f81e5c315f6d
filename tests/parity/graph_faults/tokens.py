"""Faults of visual tokens: what scales their FFNs, which are kept, and what goes with them."""

# Shapes: T tokens, K tokens kept, X text tokens, H query heads, G KV heads, d head size.

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from capa_export.config.parts import layer_of
from tests.parity.graph_faults.edit import Tape, input_of, mixed, node_called, nodes_of, replace, set_weight, weight_of

__all__ = [
    "alpha_dropped",
    "alpha_of_another_layer",
    "cache_not_gathered",
    "gather_off_by_one",
    "kept_too_few",
    "kept_unsorted",
    "last_alpha_dropped",
    "rotary_not_gathered",
    "score_over_visual_keys",
    "score_without_output_weight",
    "text_rows_not_merged",
    "wrong_score_layer",
]


def _scaled(model: ir.Model) -> list[ir.Node]:
    return list(nodes_of(model, "VisualScale"))


def alpha_dropped(model: ir.Model, size: float, which: int = 0) -> str:
    node = _scaled(model)[which]
    set_weight(model, str(input_of(node, 1).name), lambda alpha: mixed(alpha, np.ones_like(alpha), size))
    return str(node.name)


def last_alpha_dropped(model: ir.Model, size: float) -> str:
    return alpha_dropped(model, size, -1)


def alpha_of_another_layer(model: ir.Model, size: float) -> str:
    node, *_, other = _scaled(model)
    theirs = weight_of(model, str(input_of(other, 1).name))
    set_weight(model, str(input_of(node, 1).name), lambda alpha: mixed(alpha, theirs, size))
    return str(node.name)


def text_rows_not_merged(model: ir.Model, size: float) -> str:
    """The first text rows stay scaled as if they were visual."""
    node = _scaled(model)[0]
    start, end = int(min(size, 2**31)), 2**31

    def rest(op: Tape, rows: ir.Value) -> ir.Value:
        return op.op("Slice", [rows, op.ints(start), op.ints(end), op.ints(0)])

    for index in (2, 3):
        tape = Tape()
        rows = rest(tape, input_of(node, index))
        model.graph.insert_before(node, tape.nodes)
        node.replace_input_with(index, rows)
    return str(node.name)


def _changed_rows(
    op: Tape, node: ir.Node, kept: ir.Value, size: float, change: Callable[[ir.Value, ir.Value], ir.Value]
) -> ir.Value:
    """The kept rows, of which `change` makes the first `size` visual ones of what they are and where they stand."""
    scores = input_of(node, 0)
    visual = op.op("Not", [op.op("IsInf", [op.op("Gather", [scores, kept])])])
    where = op.op("Squeeze", [op.op("NonZero", [visual]), op.ints(0)])
    first = op.op("Slice", [where, op.ints(0), op.ints(int(min(size, 2**31)))])
    return op.op("ScatterElements", [kept, first, change(op.op("Gather", [kept, first]), first)])


def _gathered_with(model: ir.Model, outputs: dict[int, int], size: float, change: Callable[..., ir.Value]) -> str:
    """Gather some of what a stage gathers, output -> axis, with changed rows."""
    gather, keep = next(nodes_of(model, "TokenGather")), next(nodes_of(model, "TopKKeep"))
    last = gather
    for index, axis in outputs.items():

        def make(op: Tape, _healthy: ir.Value, index: int = index, axis: int = axis) -> ir.Value:
            rows = _changed_rows(op, keep, input_of(gather, 5), size, lambda kept, where: change(op, kept, where))
            return op.op("Gather", [input_of(gather, index), rows], {"axis": axis})

        replace(model.graph, gather.outputs[index], make, after=last)
    return str(gather.name)


def gather_off_by_one(model: ir.Model, size: float) -> str:
    def before(op: Tape, kept: ir.Value, _where: ir.Value) -> ir.Value:
        return op.op("Sub", [kept, op.ints(1)])

    return _gathered_with(model, {0: 0, 1: 2, 2: 2, 3: 1, 4: 1}, size, before)


def _ungathered(_op: Tape, _kept: ir.Value, where: ir.Value) -> ir.Value:
    return where


def rotary_not_gathered(model: ir.Model, size: float) -> str:
    return _gathered_with(model, {3: 1, 4: 1}, size, _ungathered)


def cache_not_gathered(model: ir.Model, size: float) -> str:
    """As many rows as there should be, but the first ones."""
    return _gathered_with(model, {1: 2, 2: 2}, size, _ungathered)


def kept_unsorted(model: ir.Model, size: float) -> str:
    """The first visual rows come in reverse."""
    function = model.functions[("capa", "TopKKeep", "")]
    scores = function.inputs[0]

    def make(op: Tape, kept: ir.Value) -> ir.Value:
        visual = op.op("Not", [op.op("IsInf", [op.op("Gather", [scores, kept])])])
        where = op.op("Squeeze", [op.op("NonZero", [visual]), op.ints(0)])
        first = op.op("Slice", [where, op.ints(0), op.ints(int(min(size, 2**31)))])
        turned = op.op("Slice", [first, op.ints(-1), op.ints(-(2**31)), op.ints(0), op.ints(-1)])
        return op.op("ScatterElements", [kept, first, op.op("Gather", [kept, turned])])

    replace(function, function.outputs[0], make)
    return str(next(nodes_of(model, "TopKKeep")).name)


def kept_too_few(model: ir.Model, size: float) -> str:
    count = input_of(next(nodes_of(model, "TopKKeep")), 1)
    place = count.producer()
    assert place is not None
    replace(model.graph, count, lambda op, healthy: op.op("Sub", [healthy, op.ints(int(size))]))
    return str(place.name)


def score_without_output_weight(model: ir.Model, size: float) -> str:
    """The weight goes over into the unit matrix."""
    node = next(nodes_of(model, "ContributionScore"))
    weight = weight_of(model, str(input_of(node, 3).name))
    unit = np.eye(*weight.shape, dtype=np.float32)
    mixed = ((1 - size) * weight.astype(np.float32) + size * unit).astype(weight.dtype)
    tape = Tape()
    value = tape.array(mixed)
    model.graph.insert_before(node, tape.nodes)
    node.replace_input_with(3, value)
    return str(node.name)


def score_over_visual_keys(model: ir.Model, size: float) -> str:
    """The softmax sees text keys `size` lower than they are: e^-size of their weight is left."""
    function = model.functions[("capa", "ContributionScore", "")]
    by_name = {value.name: value for node in function for value in node.outputs}
    text = function.inputs[4]

    def make(op: Tape, logits: ir.Value) -> ir.Value:
        none = op.op("ConstantOfShape", [by_name["num_tokens"]], {"value": ir.tensor(np.zeros(1, np.float32))})
        lower = op.op("Expand", [op.array(np.full(1, -size, np.float32)), op.op("Shape", [text])])
        return op.op("Add", [logits, op.op("ScatterElements", [none, text, lower])])

    replace(function, by_name["logits_1GrT"], make)
    return str(next(nodes_of(model, "ContributionScore")).name)


def wrong_score_layer(model: ir.Model, size: float) -> str:
    """Queries, keys and values of an earlier layer."""
    node = next(nodes_of(model, "ContributionScore"))
    layer = int(layer_of(str(node.name)).split(".")[1])
    theirs = node_called(model, f"model/layers.{layer - int(size)}/self_attn/Attention")
    slice_ = input_of(node, 0).producer()
    scaled = input_of(theirs, 0).producer()
    assert slice_ is not None and scaled is not None
    slice_.replace_input_with(0, input_of(scaled, 0))
    for index in (1, 2):
        node.replace_input_with(index, input_of(theirs, index))
    return str(slice_.name)
