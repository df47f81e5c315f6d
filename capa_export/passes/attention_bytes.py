"""How much memory the attention of a graph takes; apart from what tiles it, since every run asks and few need tiles."""

from collections.abc import Mapping, Sequence
from math import prod

import onnx

__all__ = ["attention_bytes", "is_unmasked_attention"]

_MASK = 3
"""Input of an Attention node that says which keys a query sees: windows and decode have one, and are small."""


def attention_bytes(model: onnx.ModelProto, shapes: Mapping[str, Sequence[int]]) -> int:
    """Largest number of bytes that the weights of an unmasked Attention node take, in FP32.

    Args:
        model: with or without its weights.
        shapes: of the inputs; those that are not named are left as they are declared.

    An attention behind a pruning stage has a length that shapes do not tell, and is smaller than those before it.
    """
    sized = onnx.ModelProto()
    sized.CopyFrom(model)
    for entry in sized.graph.input:
        for dimension, size in zip(entry.type.tensor_type.shape.dim, shapes.get(entry.name, ()), strict=False):
            dimension.dim_value = size
    inferred = onnx.shape_inference.infer_shapes(sized, data_prop=True).graph
    known = {value.name: value.type.tensor_type.shape.dim for value in inferred.value_info}
    largest = 0
    for node in inferred.node:
        if not is_unmasked_attention(node.op_type, node.input):
            continue
        query, key = ([dimension.dim_value for dimension in known.get(name, ())] for name in node.input[:2])
        # Keys are as many as queries where nothing is cached.
        lengths = (*query[:3], key[2] if len(key) == 4 and key[2] else query[2]) if len(query) == 4 else (0,)
        largest = max(largest, 4 * prod(lengths))
    return largest


def is_unmasked_attention(op_type: str, inputs: Sequence[object]) -> bool:
    """Whether a node, by its type and inputs, is attention over all keys or all earlier ones."""
    return op_type == "Attention" and not any(inputs[_MASK:])
