"""Inputs of a kit's graphs for Polygraphy, weights included: `--data-loader-script kit_inputs.py:NAME`."""

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["decode", "prefill", "visual"]

_HERE = Path(__file__).resolve().parent
_KIT = _HERE.parents[1]
_DTYPES = {"FLOAT": np.float32, "FLOAT16": np.float16}


def visual() -> Iterator[dict[str, Any]]:
    """The vision tower's."""
    yield _inputs("visual", _KIT / "visual")


def prefill() -> Iterator[dict[str, Any]]:
    """Prefill's."""
    yield _inputs("prefill", _KIT / "llm")


def decode() -> Iterator[dict[str, Any]]:
    """Those of a first step of decode."""
    yield _inputs("decode", _KIT / "llm")


def _inputs(name: str, engines: Path) -> dict[str, Any]:
    (stored,) = json.loads((_HERE / f"{name}.inputs.json").read_text(encoding="utf-8"))
    inputs = {key: np.load(io.BytesIO(base64.b64decode(one["array"]))) for key, one in stored.items()}
    weights = json.loads((engines / f"{name}.weights.json").read_text(encoding="utf-8"))
    for key, one in weights.items():
        place = engines / one["file"]
        inputs[key] = np.memmap(place, _DTYPES[one["dtype"]], "r", one["offset"], tuple(one["shape"]))
    return inputs
