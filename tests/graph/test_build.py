"""Graphs are those of onnxscript's own builder, which looks at every node anew."""

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import pytest
from onnxscript import GraphBuilder

from capa_export.graph import build
from capa_export.graph.decoder import decode_model, prefill_model
from capa_export.graph.rotary import rotary_tables
from capa_export.model.families import qwen25vl
from capa_export.model.source import Source
from capa_export.selectors.selector import SelectorChoice, load_selector, selectors


def written(make: Callable[[], ir.Model]) -> tuple[str, list[tuple[Any, ...]]]:
    """A graph as text, with what is known of every value."""
    model = make()
    values = [value for node in model.graph for value in node.outputs]
    known = [(value.name, value.type, value.shape and tuple(value.shape)) for value in values]
    return ir.to_onnx_text(model), known


@pytest.mark.parametrize("graph", ["decode", "visual", *selectors()])
def test_what_is_remembered_is_what_would_be_found_again(
    source: Source, monkeypatch: pytest.MonkeyPatch, graph: str
) -> None:
    dims, half = source.dims, ir.DataType.FLOAT16
    rotary = rotary_tables(dims)

    def make() -> ir.Model:
        if graph == "decode":
            return decode_model(dims.decoder, half, rotary, prune_layers=(2,))
        if graph == "visual":
            return qwen25vl.vision_model(dims.vision, half)
        layer = -1 if load_selector(graph).place == "input" else 2
        options: Any = {"selectors": {layer: SelectorChoice(graph)}, "linear_layers": (3,), "feature_size": 8}
        return prefill_model(dims.decoder, half, rotary, prune_layers=(layer,), **options)

    own = written(make)
    assert len(own[1]) > 50
    monkeypatch.setattr(build, "_Builder", GraphBuilder)
    assert written(make) == own
