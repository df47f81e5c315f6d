"""Export vision-language models with CAPA pruning to ONNX and TensorRT."""

__version__ = "0.1.0"
