"""Graphs whose work is out of all proportion to what they hold are refused; those that loop as builds do are taken."""

from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import ModelProto, helper

from capa_export.base.errors import CapaError
from capa_export.bundle.endless import require_end
from capa_export.selectors.selector import TensorView
from tests.selectors.one_score import _model, _specs, layout

HEAD = '<ir_version: 11, opset_import: ["": 23, "capa": 1]>'
BODY = "<body = body (int64 i, bool go, float[N] a) => (bool more, float[N] b) { more = Identity (go) b = Neg (a) }>"


def graph(text: str, body: str = BODY, functions: str = "") -> ModelProto:
    """A graph that loops as often as `n` says, which the text makes."""
    inputs = "float[N] x, int64[1] num_keep, bool always"
    return onnx.parser.parse_model(
        f"{HEAD} graph ({inputs}) => (float[N] y) {{ {text} y = Loop (n, always, x) {body} }} {functions}"
    )


DOUBLED = (
    "n1 = Identity (num_keep) " + "".join(f"n{i + 1} = Add (n{i}, n{i}) " for i in range(1, 40)) + "n = Squeeze (n40)"
)
LONG = (
    "n1 = Identity (num_keep) "
    + "".join(f"n{i + 1} = Identity (n{i}) " for i in range(1, 9999))
    + "n = Add (n9999, n1)"
)


def refusal(model: ModelProto) -> str:
    with pytest.raises(CapaError) as caught:
        require_end(Path("m.onnx"), model)
    assert str(caught.value).startswith("m.onnx: ")
    return str(caught.value)


@pytest.mark.parametrize("name", ["divprune", "cdpruner", "vispruner"])
def test_selectors_that_choose_step_by_step(name: str) -> None:
    rows = torch.zeros(14, 24)
    view = TensorView(
        is_visual=layout(2, 9, 3), num_keep=4, hidden=rows, visual_saliency=rows[:, 0], visual_features=rows
    )
    made = ir.to_proto(_model(name, _specs(view), ()))
    assert [node for function in made.functions for node in function.node if node.op_type == "Loop"]
    require_end(Path("m.onnx"), made)


@pytest.mark.parametrize(
    "text",
    [
        "n = Squeeze (num_keep)",
        "length = Shape (x) less = Sub (length, num_keep) n_1 = Div (less, num_keep) n = Squeeze (n_1)",
        "most = Constant <value_ints = [4611686018427387904]> () n = Min (most, num_keep)",
        "n = Constant <value = int64 {100}> ()",
    ],
)
def test_counts_that_follow_sizes(text: str) -> None:
    require_end(Path("m.onnx"), graph(text))


@pytest.mark.parametrize(
    "text",
    [
        "n = Constant <value = int64 {4611686018427387904}> ()",
        "n = Constant <value_int = 4611686018427387904> ()",
        "one = Constant <value_ints = [4611686018427387904]> () n = Add (one, num_keep)",
        "much = Mul (num_keep, num_keep) n = Squeeze (much)",
        "far = Constant <value_ints = [-4611686018427387904]> () n = Sub (num_keep, far)",
        "wide = Cast <to = 1> (num_keep) n = Cast <to = 7> (wide)",
        "n = Max (num_keep, elsewhere)",
        DOUBLED,
        LONG,
        "n = Far <most = 4611686018427387904> (num_keep)",
    ],
    ids=["tensor", "number", "sum", "product", "difference", "cast", "unknown", "doubled", "long", "function"],
)  # fmt: skip
def test_counts_that_do_not(text: str) -> None:
    functions = """
    <domain: "capa", opset_import: ["": 23]> Far <most> (few) => (much) {
        far = Constant <value_int: int = @most> () much = Add (few, far)
    }"""
    model = graph(text.replace("Far", "capa.Far"), functions=functions)
    assert "is a Loop of domain '' that counts further than any size, and might never end" in refusal(model)


def test_loops_in_loops() -> None:
    inner = f"b = Loop (i, go, a) {BODY.replace('body', 'inner').replace(' a)', ' c)').replace('(a)', '(c)')}"
    body = f"<body = body (int64 i, bool go, float[N] a) => (bool more, float[N] b) {{ more = Identity (go) {inner} }}>"
    assert "has others in it" in refusal(graph("n = Squeeze (num_keep)", body))
    call = BODY.replace("b = Neg (a)", "b = capa.Spin (a, i)")
    function = f"""
    <domain: "capa", opset_import: ["": 23]> Spin (x, n) => (y) {{
        always = Constant <value = bool {{1}}> () y = Loop (n, always, x) {BODY}
    }}"""
    assert "has others in it" in refusal(graph("n = Squeeze (num_keep)", call, function))


def nested(depth: int, calls: int) -> ModelProto:
    """Functions each of which calls the next so many times over."""
    versions = [helper.make_opsetid("", 23), helper.make_opsetid("capa", 1)]

    def body(operator: str, domain: str) -> list[Any]:
        names = ["x", *(f"t{i}" for i in range(1, calls)), "y"]
        return [helper.make_node(operator, [names[i]], [names[i + 1]], domain=domain) for i in range(calls)]

    functions = [
        helper.make_function(
            "capa", f"F{i}", ["x"], ["y"], body(f"F{i - 1}" if i else "Abs", "capa" * bool(i)), versions
        )
        for i in range(depth)
    ]
    x, y = (helper.make_tensor_value_info(name, 1, [1]) for name in "xy")
    call = helper.make_graph([helper.make_node(f"F{depth - 1}", ["x"], ["y"], domain="capa")], "g", [x], [y])
    return helper.make_model(call, functions=functions, opset_imports=versions)


def test_functions_that_call_no_end_of_others() -> None:
    require_end(Path("m.onnx"), nested(4, 10))
    assert "its functions come to more than 32768 nodes" in refusal(nested(5, 10))
    assert "its functions come to more than 32768 nodes" in refusal(nested(90, 10))


def test_functions_that_call_themselves() -> None:
    model = nested(2, 2)
    model.functions[0].node[1].op_type, model.functions[0].node[1].domain = "F1", "capa"
    assert "calls itself" in refusal(model)
