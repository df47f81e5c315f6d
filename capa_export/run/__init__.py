"""The execution of a bundle, on ONNX Runtime and on the engines of a GPU."""
