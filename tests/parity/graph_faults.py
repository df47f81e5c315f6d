"""Faults of the graphs: each changes a healthy one by a size and returns the first node that is then wrong.

A value keeps its name: the one that is wrong is called as the healthy one was.
T = tokens, K = tokens kept, X = text tokens, H = query heads, G = KV heads, d = head size.
"""

from collections.abc import Callable, Iterator

import numpy as np
import onnx_ir as ir

from capa_export.parity.cut import layer_of

__all__ = [
    "alpha_dropped",
    "alpha_of_another_layer",
    "attention_scale_off",
    "bias_dropped",
    "cache_hidden",
    "cache_not_gathered",
    "causal_mask_lost",
    "frequencies_off",
    "gather_off_by_one",
    "head_rows_shifted",
    "heads_swapped",
    "kept_too_few",
    "kept_unsorted",
    "kv_group_off_by_one",
    "last_alpha_dropped",
    "last_causal_mask_lost",
    "mixed",
    "mrope_rows_swapped",
    "nan_weight",
    "norm_epsilon",
    "output_weight_transposed",
    "positions_from_pruned_length",
    "residual_lost",
    "rotary_not_gathered",
    "score_over_visual_keys",
    "score_without_output_weight",
    "text_rows_not_merged",
    "tile_negated",
    "tile_off",
    "vision_bias_dropped",
    "vision_channels_shifted",
    "vision_heads_swapped",
    "vision_norm_epsilon",
    "wrong_score_layer",
]


class _Tape(ir.tape.Tape):
    """Nodes to insert, with constants."""

    def array(self, array: np.ndarray) -> ir.Value:
        return self.op("Constant", [], {"value": ir.tensor(array)})

    def ints(self, *numbers: int) -> ir.Value:
        return self.array(np.array(numbers, np.int64))


Make = Callable[[_Tape, ir.Value], ir.Value]


def _replace(graph: ir.Graph | ir.Function, value: ir.Value, make: Make, *, after: ir.Node | None = None) -> None:
    """Put what `make` makes of a value in its place and under its name; behind `after`, or behind its producer."""
    tape = _Tape()
    new = make(tape, value)
    last = after or value.producer()
    if last is None:
        graph.insert_before(graph[0], tape.nodes)
    else:
        graph.insert_after(last, tape.nodes)
    new.type, new.shape = value.type, value.shape
    if not value.is_graph_input():
        new.name, value.name = value.name, f"{value.name}/healthy"
    for user, index in tuple(value.uses()):
        if user not in tape.nodes:
            user.replace_input_with(index, new)
    for index, output in enumerate(graph.outputs):
        if output is value:
            graph.outputs[index] = new


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _nodes(model: ir.Model, op_type: str) -> Iterator[ir.Node]:
    return (node for node in model.graph if node.op_type == op_type)


def _node(model: ir.Model, name: str) -> ir.Node:
    return next(node for node in model.graph if node.name == name)


def _set_weight(model: ir.Model, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    value = model.graph.initializers[name]
    assert value.const_value is not None
    value.const_value = ir.tensor(np.ascontiguousarray(change(value.const_value.numpy().copy())), name=name)


def _weight(model: ir.Model, name: str) -> np.ndarray:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


def _count(size: float, most: int) -> int:
    return int(min(size, most))


def mixed(array: np.ndarray, other: np.ndarray, size: float, axis: int = 0) -> np.ndarray:
    """The first `size` entries of an axis from `other`."""
    count = _count(size, array.shape[axis])
    first, rest = np.split(array, [count], axis)[1], np.split(other, [count], axis)[0]
    return np.concatenate([rest.astype(array.dtype), first], axis)


def _num_layers(model: ir.Model) -> int:
    return sum(node.op_type == "Attention" for node in model.graph)


def _later_layer(model: ir.Model) -> int:
    """A layer behind the first stage, with others behind it."""
    return _num_layers(model) * 3 // 5


def _block(model: ir.Model) -> int:
    """The last vision block but one."""
    return _num_layers(model) - 2


# FFN scales.


def _scaled(model: ir.Model) -> list[ir.Node]:
    return list(_nodes(model, "VisualScale"))


def alpha_dropped(model: ir.Model, size: float, which: int = 0) -> str:
    node = _scaled(model)[which]
    _set_weight(model, str(_input(node, 1).name), lambda alpha: mixed(alpha, np.ones_like(alpha), size))
    return str(node.name)


def last_alpha_dropped(model: ir.Model, size: float) -> str:
    return alpha_dropped(model, size, -1)


def alpha_of_another_layer(model: ir.Model, size: float) -> str:
    node, *_, other = _scaled(model)
    theirs = _weight(model, str(_input(other, 1).name))
    _set_weight(model, str(_input(node, 1).name), lambda alpha: mixed(alpha, theirs, size))
    return str(node.name)


def text_rows_not_merged(model: ir.Model, size: float) -> str:
    """The first text rows stay scaled as if they were visual."""
    node = _scaled(model)[0]
    start, end = int(min(size, 2**31)), 2**31

    def rest(op: _Tape, rows: ir.Value) -> ir.Value:
        return op.op("Slice", [rows, op.ints(start), op.ints(end), op.ints(0)])

    for index in (2, 3):
        tape = _Tape()
        rows = rest(tape, _input(node, index))
        model.graph.insert_before(node, tape.nodes)
        node.replace_input_with(index, rows)
    return str(node.name)


# Selection.


def _changed_rows(
    op: _Tape, node: ir.Node, kept: ir.Value, size: float, change: Callable[[ir.Value, ir.Value], ir.Value]
) -> ir.Value:
    """The kept rows, of which `change` makes the first `size` visual ones of what they are and where they stand."""
    scores = _input(node, 0)
    visual = op.op("Not", [op.op("IsInf", [op.op("Gather", [scores, kept])])])
    where = op.op("Squeeze", [op.op("NonZero", [visual]), op.ints(0)])
    first = op.op("Slice", [where, op.ints(0), op.ints(int(min(size, 2**31)))])
    return op.op("ScatterElements", [kept, first, change(op.op("Gather", [kept, first]), first)])


def _gathered_with(model: ir.Model, outputs: dict[int, int], size: float, change: Callable[..., ir.Value]) -> str:
    """Gather some of what a stage gathers, output -> axis, with changed rows."""
    gather, keep = next(_nodes(model, "TokenGather")), next(_nodes(model, "TopKKeep"))
    last = gather
    for index, axis in outputs.items():

        def make(op: _Tape, _healthy: ir.Value, index: int = index, axis: int = axis) -> ir.Value:
            rows = _changed_rows(op, keep, _input(gather, 5), size, lambda kept, where: change(op, kept, where))
            return op.op("Gather", [_input(gather, index), rows], {"axis": axis})

        _replace(model.graph, gather.outputs[index], make, after=last)
    return str(gather.name)


def gather_off_by_one(model: ir.Model, size: float) -> str:
    def before(op: _Tape, kept: ir.Value, _where: ir.Value) -> ir.Value:
        return op.op("Sub", [kept, op.ints(1)])

    return _gathered_with(model, {0: 0, 1: 2, 2: 2, 3: 1, 4: 1}, size, before)


def _ungathered(_op: _Tape, _kept: ir.Value, where: ir.Value) -> ir.Value:
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

    def make(op: _Tape, kept: ir.Value) -> ir.Value:
        visual = op.op("Not", [op.op("IsInf", [op.op("Gather", [scores, kept])])])
        where = op.op("Squeeze", [op.op("NonZero", [visual]), op.ints(0)])
        first = op.op("Slice", [where, op.ints(0), op.ints(int(min(size, 2**31)))])
        turned = op.op("Slice", [first, op.ints(-1), op.ints(-(2**31)), op.ints(0), op.ints(-1)])
        return op.op("ScatterElements", [kept, first, op.op("Gather", [kept, turned])])

    _replace(function, function.outputs[0], make)
    return str(next(_nodes(model, "TopKKeep")).name)


def kept_too_few(model: ir.Model, size: float) -> str:
    count = _input(next(_nodes(model, "TopKKeep")), 1)
    place = count.producer()
    assert place is not None
    _replace(model.graph, count, lambda op, healthy: op.op("Sub", [healthy, op.ints(int(size))]))
    return str(place.name)


def score_without_output_weight(model: ir.Model, size: float) -> str:
    """The weight goes over into the unit matrix."""
    node = next(_nodes(model, "ContributionScore"))
    weight = _weight(model, str(_input(node, 3).name))
    unit = np.eye(*weight.shape, dtype=np.float32)
    mixed = ((1 - size) * weight.astype(np.float32) + size * unit).astype(weight.dtype)
    tape = _Tape()
    value = tape.array(mixed)
    model.graph.insert_before(node, tape.nodes)
    node.replace_input_with(3, value)
    return str(node.name)


def score_over_visual_keys(model: ir.Model, size: float) -> str:
    """The softmax sees text keys `size` lower than they are: e^-size of their weight is left."""
    function = model.functions[("capa", "ContributionScore", "")]
    by_name = {value.name: value for node in function for value in node.outputs}
    text = function.inputs[4]

    def make(op: _Tape, logits: ir.Value) -> ir.Value:
        none = op.op("ConstantOfShape", [by_name["num_tokens"]], {"value": ir.tensor(np.zeros(1, np.float32))})
        lower = op.op("Expand", [op.array(np.full(1, -size, np.float32)), op.op("Shape", [text])])
        return op.op("Add", [logits, op.op("ScatterElements", [none, text, lower])])

    _replace(function, by_name["logits_1GrT"], make)
    return str(next(_nodes(model, "ContributionScore")).name)


def wrong_score_layer(model: ir.Model, size: float) -> str:
    """Queries, keys and values of an earlier layer."""
    node = next(_nodes(model, "ContributionScore"))
    layer = int(layer_of(str(node.name)).split(".")[1])
    theirs = _node(model, f"model/layers.{layer - int(size)}/self_attn/Attention")
    slice_ = _input(node, 0).producer()
    scaled = _input(theirs, 0).producer()
    assert slice_ is not None and scaled is not None
    slice_.replace_input_with(0, _input(scaled, 0))
    for index in (1, 2):
        node.replace_input_with(index, _input(theirs, index))
    return str(slice_.name)


# Attention.


def _attention(model: ir.Model) -> ir.Node:
    return _node(model, f"model/layers.{_later_layer(model)}/self_attn/Attention")


def _gemm(model: ir.Model, name: str) -> tuple[str, str]:
    """Weight and node of a projection of the later layer."""
    layer = f"layers.{_later_layer(model)}"
    return f"model.{layer}.{name}.weight", f"model/{layer}/{name.replace('.', '/')}/Gemm"


def _cache_size(model: ir.Model) -> tuple[int, int]:
    """G and d."""
    shape = next(value.shape for value in model.graph.outputs if value.name == "present.0.key")
    assert shape is not None
    groups, size = shape[1], shape[3]
    assert isinstance(groups, int) and isinstance(size, int)
    return groups, size


def heads_swapped(model: ir.Model, size: float) -> str:
    """The first two heads' first channels change places."""
    weight, place = _gemm(model, "self_attn.o_proj")
    _, head = _cache_size(model)

    def swap(array: np.ndarray) -> np.ndarray:
        count = _count(size, head)
        order = np.arange(array.shape[1])
        order[:count], order[head : head + count] = np.arange(head, head + count), np.arange(count)
        return array[:, order]

    _set_weight(model, weight, swap)
    return place


def output_weight_transposed(model: ir.Model, size: float) -> str:
    """A square of it."""
    weight, place = _gemm(model, "self_attn.o_proj")

    def transpose(array: np.ndarray) -> np.ndarray:
        count = _count(size, min(array.shape))
        array[:count, :count] = array[:count, :count].T.copy()
        return array

    _set_weight(model, weight, transpose)
    return place


def kv_group_off_by_one(model: ir.Model, size: float) -> str:
    """Every query head reads the first channels of the next group."""
    node = _attention(model)
    groups, head = _cache_size(model)
    order = np.roll(np.arange(groups), -1)
    for index in (1, 2):
        tape = _Tape()
        rolled = tape.op("Gather", [_input(node, index), tape.array(order)], {"axis": 1})
        first = tape.array(np.arange(head) < size)
        wrong = tape.op("Where", [first, rolled, _input(node, index)])
        model.graph.insert_before(node, tape.nodes)
        node.replace_input_with(index, wrong)
    return str(node.name)


def causal_mask_lost(model: ir.Model, size: float, layer: int | None = None) -> str:
    """Every token sees so many of those behind it."""
    name = f"layers.{_later_layer(model) if layer is None else layer}"
    node = _node(model, f"model/{name}/self_attn/Attention")
    tape = _Tape()
    length = tape.op("Squeeze", [tape.op("Shape", [_input(node, 1)], {"start": 2, "end": 3}), tape.ints(0)])
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
    return causal_mask_lost(model, size, _num_layers(model) - 1)


def attention_scale_off(model: ir.Model, size: float) -> str:
    node = _attention(model)
    scale = node.attributes["scale"].as_float()
    node.attributes["scale"] = ir.AttrFloat32("scale", scale * (1 + size))
    return str(node.name)


# Positions.


def mrope_rows_swapped(model: ir.Model, size: float) -> str:
    """Height and width of the first of their frequencies."""
    gather = next(_nodes(model, "Gather"))
    constant = _input(gather, 1).producer()
    assert constant is not None
    axis = constant.attributes["value"].as_tensor().numpy().copy()
    spatial = np.flatnonzero(axis)
    # One frequency of either axis in turn, so that a small fault has some of both.
    turns = np.concatenate([*zip(spatial[axis[spatial] == 1], spatial[axis[spatial] == 2], strict=True)])
    chosen = turns[: _count(size, len(turns))]
    axis[chosen] = 3 - axis[chosen]
    constant.attributes["value"] = ir.AttrTensor("value", ir.tensor(axis))
    return str(gather.name)


def frequencies_off(model: ir.Model, size: float) -> str:
    """All angles too large by a share."""
    angle = next(_nodes(model, "Mul"))
    constant = _input(angle, 1).producer()
    assert constant is not None
    frequency = constant.attributes["value"].as_tensor().numpy()
    constant.attributes["value"] = ir.AttrTensor("value", ir.tensor((frequency * (1 + size)).astype(np.float32)))
    return str(angle.name)


def positions_from_pruned_length(model: ir.Model, size: float) -> str:
    """The answer's positions go on from what the last stage left."""
    inputs = {value.name: value for value in model.graph.inputs}
    lengths, reader = inputs["past_lengths"], next(iter(inputs["position_ids"].uses())).node

    def make(op: _Tape, positions: ir.Value) -> ir.Value:
        before, after = (op.op("Gather", [lengths, op.ints(stage)], {"axis": 0}) for stage in (0, -1))
        dropped = op.op("Min", [op.op("Sub", [before, after]), op.array(np.array(int(min(size, 2**31))))])
        return op.op("Sub", [positions, op.op("Unsqueeze", [dropped, op.ints(2)])])

    _replace(model.graph, inputs["position_ids"], make)
    return str(reader.name)


def cache_hidden(model: ir.Model, size: float) -> str:
    """Decode does not see the first cached rows."""
    node = next(_nodes(model, "Sub"))
    _replace(model.graph, node.outputs[0], lambda op, padding: op.op("Add", [padding, op.ints(int(size))]))
    return str(node.name)


# Weights and norms.


def _norm_epsilon(model: ir.Model, place: str, size: float) -> str:
    node = _node(model, place)
    epsilon = node.attributes["epsilon"].as_float()
    node.attributes["epsilon"] = ir.AttrFloat32("epsilon", epsilon * (1 + size))
    return place


def norm_epsilon(model: ir.Model, size: float) -> str:
    return _norm_epsilon(model, f"model/layers.{_later_layer(model)}/input_layernorm/RMSNormalization", size)


def bias_dropped(model: ir.Model, size: float) -> str:
    weight, place = _gemm(model, "self_attn.v_proj")
    _set_weight(model, weight.replace("weight", "bias"), lambda bias: mixed(bias, np.zeros_like(bias), size))
    return place


def tile_negated(model: ir.Model, size: float) -> str:
    """A square of a weight has the wrong sign."""
    weight, place = _gemm(model, "mlp.down_proj")

    def negate(array: np.ndarray) -> np.ndarray:
        count = _count(size, max(array.shape))
        array[:count, :count] *= -1
        return array

    _set_weight(model, weight, negate)
    return place


def tile_off(model: ir.Model, size: float) -> str:
    """16 x 16 weights are too large by a share."""
    weight, place = _gemm(model, "mlp.down_proj")

    def enlarge(array: np.ndarray) -> np.ndarray:
        array[:16, :16] = (array[:16, :16].astype(np.float32) * (1 + size)).astype(array.dtype)
        return array

    _set_weight(model, weight, enlarge)
    return place


def nan_weight(model: ir.Model, size: float) -> str:
    def spoil(array: np.ndarray) -> np.ndarray:
        array[5 : 5 + int(size)] = np.nan
        return array

    _set_weight(model, "model.norm.weight", spoil)
    return "model/norm/RMSNormalization"


def residual_lost(model: ir.Model, size: float) -> str:
    """The first channels of what the attention is added to."""
    node = _node(model, f"model/layers.{_later_layer(model)}/Add")
    left = _input(node, 0)
    width = len(_weight(model, "model.norm.weight"))
    tape = _Tape()
    wrong = tape.op("Mul", [left, tape.op("CastLike", [tape.array((np.arange(width) >= size) * 1.0), left])])
    model.graph.insert_before(node, tape.nodes)
    node.replace_input_with(0, wrong)
    return str(node.name)


def head_rows_shifted(model: ir.Model, size: float) -> str:
    """Some tokens of the LM head have the next one's row."""

    def shift(array: np.ndarray) -> np.ndarray:
        return mixed(array, np.roll(array, -1, axis=0), size)

    _set_weight(model, "lm_head.weight", shift)
    return "lm_head/Gemm"


# Vision.


def vision_norm_epsilon(model: ir.Model, size: float) -> str:
    block = _block(model)
    place = next(str(n.name) for n in model.graph if (n.name or "").startswith(f"visual/blocks.{block}/norm1/"))
    return _norm_epsilon(model, place, size)


def vision_bias_dropped(model: ir.Model, size: float) -> str:
    name = f"visual.blocks.{_block(model)}.attn.proj"
    _set_weight(model, f"{name}.bias", lambda bias: mixed(bias, np.zeros_like(bias), size))
    return f"visual/blocks.{_block(model)}/attn/proj/Gemm"


def vision_heads_swapped(model: ir.Model, size: float) -> str:
    name = f"visual.blocks.{_block(model)}.attn"
    heads = int(_weight(model, f"{name}.proj.weight").shape[1]) // 2

    def swap(array: np.ndarray) -> np.ndarray:
        count = _count(size, heads)
        order = np.arange(array.shape[1])
        order[:count], order[heads : heads + count] = np.arange(heads, heads + count), np.arange(count)
        return array[:, order]

    _set_weight(model, f"{name}.proj.weight", swap)
    return f"visual/blocks.{_block(model)}/attn/proj/Gemm"


def vision_channels_shifted(model: ir.Model, size: float) -> str:
    _set_weight(model, "visual.merger.mlp.2.weight", lambda w: mixed(w, np.roll(w, 1, axis=0), size))
    return "visual/merger/mlp/2/Gemm"
