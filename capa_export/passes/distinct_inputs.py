"""Keeps TensorRT from joining products with weights of eight bits, which it would then dequantize at every run."""

from collections import defaultdict

import numpy as np
import onnx_ir as ir

from capa_export.passes.pack_weights import packed_forms, packed_name

__all__ = ["DistinctInputsPass"]


_MULTIPLY = "part/Mul"


class DistinctInputsPass(ir.passes.InPlacePass):
    """Lets every product whose weight has a scale an output read a part of its input that no other reads.

    TensorRT joins products that read the same, as q, k and v do, and adds the residual to what follows attention in one
    layer with the product. In either case it dequantizes the whole weight first, at every run. A product of inputs that
    were just multiplied by a constant of their size it leaves alone, and computes as one layer, weight and all.

    The first product reads half of the input, the next a quarter and so on, and the one scale of a weight before the
    product is so many times as large: powers of two, which round nothing.

    Ensures that no two such products read the same value. A second run changes nothing.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        sharing = defaultdict[ir.Value, list[tuple[ir.Node, ir.Node]]](list)
        for name, form in packed_forms(graph).items():
            if form.group is None:
                (dequantize,) = (use.node for use in graph.initializers[packed_name(name)].uses())
                (product,) = (use.node for use in dequantize.outputs[0].uses())
                given = product.inputs[0]
                assert given is not None
                before = given.producer()
                if before is None or not str(before.name).endswith(_MULTIPLY):
                    sharing[given].append((dequantize, product))
        for pairs in sharing.values():
            for step, (dequantize, product) in enumerate(pairs, start=1):
                _take_part(graph, dequantize, product, 2.0**-step)
        return ir.passes.PassResult(model, modified=bool(sharing))


def _take_part(graph: ir.Graph, dequantize: ir.Node, product: ir.Node, part: float) -> None:
    """Let a product read a part of its input, and its weight be so many times as large."""
    given, numbers, scale = product.inputs[0], dequantize.inputs[0], dequantize.inputs[1]
    assert given is not None and scale is not None and scale.const_value is not None
    assert numbers is not None and numbers.shape is not None
    held = scale.const_value.numpy()
    wide = ir.TensorType(scale.const_value.dtype)
    scope = str(product.name).rpartition("/")[0]
    parts = np.full(numbers.shape.numpy()[0], part, held.dtype)

    def constant(name: str, array: np.ndarray) -> ir.Value:
        value = ir.Value(name=name, type=wide, shape=ir.Shape(array.shape), const_value=ir.Tensor(array, name=name))
        graph.register_initializer(value)
        return value

    factors = constant(f"{scope}/parts", parts)
    name = f"{scope}/{_MULTIPLY}"
    read = ir.Value(name=f"{name}/output_0", type=wide)
    graph.insert_before(product, ir.node("Mul", [given, factors], name=name, outputs=[read]))
    product.replace_input_with(0, read)
    dequantize.replace_input_with(1, constant(f"{scope}/part_scale", (held / part).astype(held.dtype).reshape(())))
    if not scale.uses():
        del graph.initializers[str(scale.name)]
