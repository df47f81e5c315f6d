"""The ONNX graphs, written module by module with onnxscript.nn."""
