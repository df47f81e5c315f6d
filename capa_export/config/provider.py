"""ONNX Runtime's execution providers, as people name them."""

from typing import Literal

__all__ = ["Provider"]

Provider = Literal["cpu", "cuda", "tensorrt", "nv-tensorrt-rtx"]
