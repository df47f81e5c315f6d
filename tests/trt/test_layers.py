"""What is read of an engine: its fused layers, and which of them copy weights."""

from pathlib import Path

import pytest

from capa_export.trt.layers import parse_layers, read_engine, weight_copies

# Two real lines, shortened: [in, out] weights are copied in every step, those of a Gemm are not.
_COPY = (
    "Name: __myl_Move_myl0_2, LayerType: kgen, "
    "Inputs: [ { Name: w, Dimensions: [512,1024], Strides: [1024,1], StrideOrder: [1,0], Datatype: Half, Format: F }], "
    "Constants: [], "
    "Outputs: [ { Name: __mye209_myl0, Dimensions: [512,1024], Strides: [1,512], Datatype: Half, Format: F }], "
    "TacticName: __myl_Move_0xf7, StreamId: 0, Metadata: [ONNX Layer: mlp/MatMul]\x1f[ONNX Layer: mlp/Add]"
)
_GEMM = (
    "Name: mlp/Gemm_myl0_3, LayerType: gemm, "
    "Inputs: [ { Name: x, Dimensions: [-1,512], Strides: [512,1], Datatype: Half, Format: F }, "
    "{ Name: w, Dimensions: [512,1024], Strides: [1,512], Datatype: Half, Format: F }], "
    "Constants: [ { Name: beta, Dimensions: [1], Datatype: Float, Format: F }], "
    "Outputs: [ { Name: y, Dimensions: [-1,1024], Strides: [1024,1], Datatype: Half, Format: F }], "
    "TacticName: t, StreamId: 0, Metadata: "
)


def test_a_weight_copy_is_told_from_a_multiplication() -> None:
    layers = parse_layers(f"Layers:\n{_COPY}\n{_GEMM}\n\nI/O Tensors:\n Name: x, IOMode: Input\n")
    assert [layer.type for layer in layers] == ["kgen", "gemm"]
    assert layers[0].onnx == ("mlp/MatMul", "mlp/Add")
    assert [tensor.name for tensor in layers[1].inputs] == ["x", "w"]
    assert weight_copies(layers, {"w"}) == layers[:1]
    assert weight_copies(layers, set()) == [], "moving activations is no copy of a weight"
    constant = parse_layers(_COPY.replace("Inputs: [ {", "Constants: [ {").replace(", Constants: []", ", Inputs: []"))
    assert weight_copies(constant, set()) == constant


@pytest.mark.parametrize("text", ["", f"Layers:\n{_GEMM}\n"])
def test_an_engine_without_a_list_of_layers_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    engine = tmp_path / "decode"
    engine.with_suffix(".layers.txt").write_text(text, encoding="utf-8")
    engine.with_suffix(".log").write_text("", encoding="utf-8")
    built = dict.fromkeys(("onnx", "bytes", "seconds", "peak_rss_bytes", "capa_nodes", "version"))
    read_engine(engine, {**built, "warnings": []}, tmp_path / "none")
    said = "lists no layers, so whether weights are copied at every run is not known"
    assert (said in capsys.readouterr().err) == (text == "")
