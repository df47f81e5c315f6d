"""Graph passes: each changes one property of an ONNX graph, in place."""
