"""Weights become network inputs only where TensorRT multiplies them as they lie, and their bytes are not read."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from capa_export.base.errors import CapaError
from capa_export.passes.external_weights import ExternalWeight, ExternalWeightsPass, movable_weights

GRAPH = """
<ir_version: 10, opset_import: ["": 24]>
g (float16[T, 256] x, float16[256, 256] first, float16[256, 256] also_cast, float16[256, 256] untransposed,
   float16[16, 256] small) => (float16[T, 256] y, float[T, 256] z) {
    a = Gemm <transB = 1> (x, first)
    b = Gemm <transB = 1> (a, also_cast)
    c = Gemm (b, untransposed)
    d = Gemm <transB = 1> (c, small)
    y = Gemm (d, small)
    wide = Cast <to = 1> (also_cast)
    x_wide = Cast <to = 1> (x)
    z = Gemm <transB = 1> (x_wide, wide)
}
"""


def _model() -> ir.Model:
    model = ir.from_onnx_text(GRAPH)
    weights = model.graph.inputs[1:]
    del model.graph.inputs[1:]
    random = np.random.default_rng(0)
    for value in weights:
        array = random.standard_normal(value.shape.numpy()).astype(np.float16)
        value.const_value = ir.Tensor(array, name=value.name)
        model.graph.register_initializer(value)
    return model


def _saved(tmp_path: Path) -> Path:
    path = tmp_path / "g.onnx"
    ir.save(_model(), path, external_data="g.onnx.data", size_threshold_bytes=256)
    return path


def test_only_what_gemm_alone_reads_transposed_moves(tmp_path: Path) -> None:
    model = ir.load(_saved(tmp_path))
    assert [weight.name for weight in movable_weights(model)] == ["first"]
    assert ExternalWeightsPass()(model).modified
    assert [value.name for value in model.graph.inputs] == ["x", "first"]
    assert set(model.graph.initializers) == {"also_cast", "untransposed", "small"}
    moved_path = tmp_path / "moved.onnx"
    moved_path.write_bytes(ir.to_proto(model).SerializeToString())
    onnx.checker.check_model(moved_path)


def test_the_entry_says_where_the_bytes_lie(tmp_path: Path) -> None:
    path = _saved(tmp_path)
    expected = {name: value.const_value.numpy() for name, value in _model().graph.initializers.items()}
    (weight,) = movable_weights(ir.load(path))
    assert weight == ExternalWeight(
        name="first",
        location="g.onnx.data",
        offset=weight.offset,
        length=256 * 256 * 2,
        dtype="FLOAT16",
        shape=(256, 256),
    )
    data = (tmp_path / weight.location).read_bytes()[weight.offset : weight.offset + weight.length]
    assert np.array_equal(np.frombuffer(data, np.float16).reshape(weight.shape), expected["first"])


def test_the_bytes_are_not_needed(tmp_path: Path) -> None:
    path = _saved(tmp_path)
    (tmp_path / "g.onnx.data").unlink()
    assert len(movable_weights(ir.load(path))) == 1
    assert ExternalWeightsPass()(ir.load(path)).modified


def test_a_second_run_moves_nothing(tmp_path: Path) -> None:
    model = ir.load(_saved(tmp_path))
    assert ExternalWeightsPass()(model).modified
    text = ir.to_proto(model).SerializeToString()
    assert movable_weights(model) == []
    assert not ExternalWeightsPass()(model).modified
    assert ir.to_proto(model).SerializeToString() == text


def test_weights_inside_the_onnx_file_are_refused() -> None:
    with pytest.raises(CapaError, match="the bytes of first are in the ONNX file"):
        ExternalWeightsPass()(_model())
