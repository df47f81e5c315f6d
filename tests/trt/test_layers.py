"""What is read of an engine: its fused layers, and which of them copy weights."""

from capa_export.trt.layers import parse_layers, weight_copies

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
