"""TensorRT's headers, which no package index has, and which are not ours to ship."""

import os
from pathlib import Path

import pytest

__all__ = ["headers_of_tensorrt"]


def headers_of_tensorrt() -> Path:
    """Their folder; a test without it is left out, and says what to do."""
    if not (folder := os.environ.get("TENSORRT_INCLUDE")):
        pytest.skip(
            "no plugin library without TensorRT's headers, which no package index has: set TENSORRT_INCLUDE "
            "to the include folder of TensorRT 10.3 to 11, or of https://github.com/NVIDIA/TensorRT at its tag"
        )
    return Path(folder)
