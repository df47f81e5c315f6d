"""A graph whose FP16 attention is computed in FP32: ONNX Runtime sums it in FP16 on a CPU before 1.25.

Its error in one node is then twenty times that of later versions, which is more than a gate allows. Shipped graphs keep
their one Attention node; this is for sessions on a CPU alone.
"""

import onnx_ir as ir

__all__ = ["WideAttentionPass"]


class WideAttentionPass(ir.passes.InPlacePass):
    """Casts what enters each FP16 Attention node of the graph itself to FP32, and what leaves it back.

    Ensures that every value of the graph before keeps its name and its dtype.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        nodes = [node for node in model.graph if node.domain == "" and node.op_type == "Attention"]
        narrow = [node for node in nodes if node.inputs[0] and node.inputs[0].dtype == ir.DataType.FLOAT16]
        for node in narrow:
            for index, value in enumerate(node.inputs):
                if value is not None and value.dtype == ir.DataType.FLOAT16:
                    cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT}, name=f"{node.name}/Cast_{index}")
                    cast.outputs[0].name, cast.outputs[0].shape = f"{cast.name}/output_0", value.shape
                    cast.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
                    model.graph.insert_before(node, cast)
                    node.replace_input_with(index, cast.outputs[0])
            mixed = node.outputs[0]
            back = ir.node("Cast", [mixed], {"to": ir.DataType.FLOAT16}, name=f"{node.name}/Cast")
            mixed.replace_all_uses_with(back.outputs[0], replace_graph_outputs=True)
            back.replace_input_with(0, mixed)
            back.outputs[0].shape, back.outputs[0].type = mixed.shape, ir.TensorType(ir.DataType.FLOAT16)
            back.outputs[0].name, mixed.name = mixed.name, f"{node.name}/wide"
            mixed.dtype = ir.DataType.FLOAT
            model.graph.insert_after(node, back)
        return ir.passes.PassResult(model, modified=bool(narrow))
