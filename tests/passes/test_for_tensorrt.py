"""What a TensorRT builder is made to read: bodies where there is no plugin, and attention that it may decompose."""

import onnx_ir as ir
import pytest

from capa_export.graph.functions import PLUGIN
from capa_export.passes.for_tensorrt import DecomposableAttentionPass, InlineBodiesPass


def _model() -> ir.Model:
    """Two nodes with a body, of which the first may become a plugin layer."""
    model = ir.from_onnx_text(
        """<ir_version: 11, opset_import: ["": 23, "capa": 1]>
        g (float16[1, 2, T, 8] x) => (float16[1, 2, T, 8] z) {
            first = capa.Twice (x)
            y = Attention <scale = 1.0> (first, first, first)
            z = capa.Twice (y)
        }
        <opset_import: ["": 23], domain: "capa">
        Twice (x) => (y) { y = Add (x, x) }"""
    )
    for name, value in PLUGIN.items():
        model.graph[0].attributes.add(ir.convenience.convert_attribute(name, value))
    return model


@pytest.mark.parametrize(
    ("plugins", "types"), [(True, ["Twice", "Attention", "Add"]), (False, ["Add", "Attention", "Add"])]
)
def test_bodies_take_the_places_of_what_is_no_plugin(plugins: bool, types: list[str]) -> None:  # noqa: FBT001
    model, inline = _model(), InlineBodiesPass(plugins=plugins)
    assert inline(model).modified
    assert [node.op_type for node in model.graph] == types
    assert not model.functions
    before = ir.to_proto(model).SerializeToString()
    assert not inline(model).modified
    assert ir.to_proto(model).SerializeToString() == before


def test_attention_may_be_decomposed() -> None:
    model = _model()
    assert DecomposableAttentionPass()(model).modified
    assert model.graph[1].attributes["TRT_decomposable"].as_int() == 1
    assert not DecomposableAttentionPass()(model).modified
