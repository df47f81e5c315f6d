"""Faults of weights and norms, those of the vision tower too."""

import numpy as np
import onnx_ir as ir

from tests.parity.graph_faults.edit import (
    Tape,
    gemm,
    input_of,
    later_layer,
    limited,
    mixed,
    node_called,
    set_weight,
    vision_block,
    weight_of,
)

__all__ = [
    "bias_dropped",
    "head_rows_shifted",
    "nan_weight",
    "norm_epsilon",
    "residual_lost",
    "tile_negated",
    "tile_off",
    "vision_bias_dropped",
    "vision_channels_shifted",
    "vision_heads_swapped",
    "vision_norm_epsilon",
]


def _norm_epsilon(model: ir.Model, place: str, size: float) -> str:
    node = node_called(model, place)
    epsilon = node.attributes["epsilon"].as_float()
    node.attributes["epsilon"] = ir.AttrFloat32("epsilon", epsilon * (1 + size))
    return place


def norm_epsilon(model: ir.Model, size: float) -> str:
    return _norm_epsilon(model, f"model/layers.{later_layer(model)}/input_layernorm/RMSNormalization", size)


def bias_dropped(model: ir.Model, size: float) -> str:
    weight, place = gemm(model, "self_attn.v_proj")
    set_weight(model, weight.replace("weight", "bias"), lambda bias: mixed(bias, np.zeros_like(bias), size))
    return place


def tile_negated(model: ir.Model, size: float) -> str:
    """A square of a weight has the wrong sign."""
    weight, place = gemm(model, "mlp.down_proj")

    def negate(array: np.ndarray) -> np.ndarray:
        count = limited(size, max(array.shape))
        array[:count, :count] *= -1
        return array

    set_weight(model, weight, negate)
    return place


def tile_off(model: ir.Model, size: float) -> str:
    """16 x 16 weights are too large by a share."""
    weight, place = gemm(model, "mlp.down_proj")

    def enlarge(array: np.ndarray) -> np.ndarray:
        array[:16, :16] = (array[:16, :16].astype(np.float32) * (1 + size)).astype(array.dtype)
        return array

    set_weight(model, weight, enlarge)
    return place


def nan_weight(model: ir.Model, size: float) -> str:
    def spoil(array: np.ndarray) -> np.ndarray:
        array[5 : 5 + int(size)] = np.nan
        return array

    set_weight(model, "model.norm.weight", spoil)
    return "model/norm/RMSNormalization"


def residual_lost(model: ir.Model, size: float) -> str:
    """The first channels of what the attention is added to."""
    node = node_called(model, f"model/layers.{later_layer(model)}/Add")
    left = input_of(node, 0)
    width = len(weight_of(model, "model.norm.weight"))
    tape = Tape()
    wrong = tape.op("Mul", [left, tape.op("CastLike", [tape.array((np.arange(width) >= size) * 1.0), left])])
    model.graph.insert_before(node, tape.nodes)
    node.replace_input_with(0, wrong)
    return str(node.name)


def head_rows_shifted(model: ir.Model, size: float) -> str:
    """Some tokens of the LM head have the next one's row."""

    def shift(array: np.ndarray) -> np.ndarray:
        return mixed(array, np.roll(array, -1, axis=0), size)

    set_weight(model, "lm_head.weight", shift)
    return "lm_head/Gemm"


def vision_norm_epsilon(model: ir.Model, size: float) -> str:
    block = vision_block(model)
    place = next(str(n.name) for n in model.graph if (n.name or "").startswith(f"visual/blocks.{block}/norm1/"))
    return _norm_epsilon(model, place, size)


def vision_bias_dropped(model: ir.Model, size: float) -> str:
    name = f"visual.blocks.{vision_block(model)}.attn.proj"
    set_weight(model, f"{name}.bias", lambda bias: mixed(bias, np.zeros_like(bias), size))
    return f"visual/blocks.{vision_block(model)}/attn/proj/Gemm"


def vision_heads_swapped(model: ir.Model, size: float) -> str:
    name = f"visual.blocks.{vision_block(model)}.attn"
    heads = int(weight_of(model, f"{name}.proj.weight").shape[1]) // 2

    def swap(array: np.ndarray) -> np.ndarray:
        count = limited(size, heads)
        order = np.arange(array.shape[1])
        order[:count], order[heads : heads + count] = np.arange(heads, heads + count), np.arange(count)
        return array[:, order]

    set_weight(model, f"{name}.proj.weight", swap)
    return f"visual/blocks.{vision_block(model)}/attn/proj/Gemm"


def vision_channels_shifted(model: ir.Model, size: float) -> str:
    set_weight(model, "visual.merger.mlp.2.weight", lambda w: mixed(w, np.roll(w, 1, axis=0), size))
    return "visual/merger/mlp/2/Gemm"
