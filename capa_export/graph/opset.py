"""The ONNX versions every graph is written in."""

__all__ = ["IR_VERSION", "OPSET"]

OPSET = 23
"""Lowest with Attention, RotaryEmbedding and RMSNormalization."""
IR_VERSION = 11
