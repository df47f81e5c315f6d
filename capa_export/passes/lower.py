"""Writes a graph in the operators of older TensorRT: below 10.15 the parser lacks some that our graphs use.

B = batch, T = queries, L = keys, H = query heads, G = KV heads, r = H / G, d = head size.
"""

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from capa_export.passes.pack_weights import packed_forms
from capa_export.passes.stand_ins import replace_by_bodies

__all__ = ["NATIVE", "LowerPass"]

NATIVE = (10, 15)
"""First TensorRT that imports all of them: RotaryEmbedding and RMSNormalization; Attention came in 10.14."""
_OPSET, _IR_VERSION = 20, 10
"""The latest that TensorRT 10.0 to 10.3 are documented to read."""
_BLOCKS = 21
"""The first that has scales of blocks, which their parsers read in any."""
_UNKNOWN = ("Attention", "RotaryEmbedding", "RMSNormalization", "CumSum")

_RMS_NORMALIZATION = """
RMSNormalization <epsilon> (x, scale) => (y) {
    wide = Cast <to = 1> (x)
    square = Mul (wide, wide)
    last_axis = Constant <value_ints = [-1]> ()
    mean = ReduceMean (square, last_axis)
    least = Constant <value_float: float = @epsilon> ()
    shifted = Add (mean, least)
    root = Sqrt (shifted)
    normed = Div (wide, root)
    narrow = CastLike (normed, x)
    y = Mul (narrow, scale)
}
"""

_ROTARY_EMBEDDING = """
RotaryEmbedding (x, cos_BTd, sin_BTd) => (y) {
    head_axis = Constant <value_ints = [1]> ()
    cos_B1Td = Unsqueeze (cos_BTd, head_axis)
    sin_B1Td = Unsqueeze (sin_BTd, head_axis)
    first, second = Split <axis = -1, num_outputs = 2> (x)
    first_cos = Mul (first, cos_B1Td)
    second_sin = Mul (second, sin_B1Td)
    second_cos = Mul (second, cos_B1Td)
    first_sin = Mul (first, sin_B1Td)
    real = Sub (first_cos, second_sin)
    imaginary = Add (second_cos, first_sin)
    y = Concat <axis = -1> (real, imaginary)
}
"""

# Four axes, repeated KV heads and a softmax between two casts: what TensorRT still makes one attention kernel of.
_ATTENTION = """
Attention (query, {inputs}) => (y) {{
    {repeat}
    key_BHdL = Transpose <perm = [0, 1, 3, 2]> (key_BHLd)
    product = MatMul (query, key_BHdL)
    {hide}
    weights = Softmax <axis = -1> (visible)
    narrow = CastLike (weights, query)
    y = MatMul (narrow, value_BHLd)
}}
"""
_REPEAT = """
    repeats = Constant <value_ints = [{repeats}]> ()
    repeat_axis = Constant <value_ints = [2]> ()
    batch_groups = Shape <start = 0, end = 2> (key)
    length_size = Shape <start = 2, end = 4> (key)
    batch_heads = Shape <start = 0, end = 2> (query)
    repeated = Concat <axis = 0> (batch_groups, repeats, length_size)
    merged = Concat <axis = 0> (batch_heads, length_size)
    key_BG1Ld = Unsqueeze (key, repeat_axis)
    value_BG1Ld = Unsqueeze (value, repeat_axis)
    key_BGrLd = Expand (key_BG1Ld, repeated)
    value_BGrLd = Expand (value_BG1Ld, repeated)
    key_BHLd = Reshape (key_BGrLd, merged)
    value_BHLd = Reshape (value_BGrLd, merged)
"""
_SHOW_ALL = "visible = Cast <to = 1> (product)"
_ADD_MASK = """
    scores = Cast <to = 1> (product)
    mask_wide = Cast <to = 1> (mask)
    visible = Add (scores, mask_wide)
"""
_CAUSAL = """
    scores = Cast <to = 1> (product)
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    column_axis = Constant <value_ints = [1]> ()
    num_queries = Shape <start = 2, end = 3> (query)
    num_keys = Shape <start = 3, end = 4> (key_BHdL)
    scalar_queries = Squeeze (num_queries)
    scalar_keys = Squeeze (num_keys)
    row_T = Range (zero, scalar_queries, one)
    row_T1 = Unsqueeze (row_T, column_axis)
    column_L = Range (zero, scalar_keys, one)
    later_TL = Greater (column_L, row_T1)
    lowest = Constant <value_float = -65504.0> ()
    visible = Where (later_TL, lowest, scores)
"""

# Before 10.8 a loop over the tokens, for floating point only.
_CUM_SUM = """
CumSum (x, axis) => (y) {
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    length = Size (x)
    column_T = Range (zero, length, one)
    column_axis = Constant <value_ints = [1]> ()
    row_T1 = Unsqueeze (column_T, column_axis)
    later_TT = Greater (column_T, row_T1)
    seen_TT = Where (later_TT, zero, x)
    y = ReduceSum <keepdims = 0> (seen_TT, column_axis)
}
"""


class LowerPass(ir.passes.InPlacePass):
    """Replaces what the ONNX parser of an older TensorRT does not know by what that of 10.3 knows.

    Norms and softmax stay in FP32. A node's replacement has its name as a scope, and its outputs keep their names.

    Requires operators as our graphs use them. Ensures that none is left that 10.3 does not know, unless the version
    knows all of them, and then that nothing has changed.

    Args:
        version: of TensorRT.
    """

    def __init__(self, version: tuple[int, ...]) -> None:
        super().__init__()
        self.version = version

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
        nodes = [node for graph in graphs for node in graph if node.domain == "" and node.op_type in _UNKNOWN]
        if self.version >= NATIVE or not nodes:
            return ir.passes.PassResult(model, modified=False)
        # For the numbers of heads.
        ShapeInferencePass()(model)
        packed = bool(packed_forms(model.graph))
        opset = _BLOCKS if packed else _OPSET
        for graph in graphs:
            graph.opset_imports[""] = opset
        model.ir_version = _IR_VERSION
        replace_by_bodies(model, {node: _body(node) for node in nodes}, opset)
        return ir.passes.PassResult(model, modified=True)


def _body(node: ir.Node) -> str:
    """The text of the function to stand for a node."""
    attributes = node.attributes
    if node.op_type == "RMSNormalization":
        assert attributes.get_int("axis", -1) == -1 and attributes.get_int("stash_type", 1) == 1
        return _RMS_NORMALIZATION
    if node.op_type == "RotaryEmbedding":
        assert len(node.inputs) == 3 and not attributes
        return _ROTARY_EMBEDDING
    if node.op_type == "CumSum":
        assert not attributes
        return _CUM_SUM
    assert attributes.get_float("scale", 0.0) == 1.0 and len(node.outputs) == 1 and len(node.inputs) <= 4
    return _attention(node, causal=attributes.get_int("is_causal", 0) == 1)


def _attention(node: ir.Node, *, causal: bool) -> str:
    heads, groups = (value.shape[1] for value in node.inputs[:2] if value is not None and value.shape is not None)
    assert isinstance(heads, int) and isinstance(groups, int)
    masked = len(node.inputs) == 4
    assert not (masked and causal)
    names = ["key", "value", "mask"] if groups < heads else ["key_BHLd", "value_BHLd", "mask"]
    return _ATTENTION.format(
        inputs=", ".join(names[: len(node.inputs) - 1]),
        repeat=_REPEAT.format(repeats=heads // groups) if groups < heads else "",
        hide=_ADD_MASK if masked else _CAUSAL if causal else _SHOW_ALL,
    )
