"""How the weights of a decoder's layers are quantized, as `--quantize` and recipes say it."""

import re
from typing import Literal

from capa_export.base.dims import DecoderDims
from capa_export.base.errors import CapaError, ExitCode

__all__ = ["GROUPS", "Quantization", "check_groups", "looks_at_samples", "parse_quantization", "rounding_group"]

Quantization = Literal[
    "none",
    "int4",
    "int4:32",
    "int4:64",
    "int4:128",
    "int4/rtn",
    "int4:32/rtn",
    "int4:64/rtn",
    "int4:128/rtn",
]
"""Plain numbers whatever the checkpoint has, or INT4 in groups of so many inputs, 128 where none are named.

Samples decide what weights are rounded to; behind `/rtn` (round to nearest) they are rounded as they are.
"""
GROUPS = (32, 64, 128)
"""Inputs of a group with one scale that both ONNX Runtime and TensorRT multiply with as they are stored."""
_WORD = re.compile(r"int4(?::(\d+))?(/rtn)?")


def parse_quantization(word: str) -> Quantization:
    """The word, found to be one that is known.

    Raises:
        CapaError: it is not.
    """
    match = _WORD.fullmatch(word)
    if match and match[1] and int(match[1]) not in GROUPS:
        known = ", ".join(map(str, GROUPS))
        raise CapaError(
            f"--quantize {word}: groups of {match[1]} are multiplied nowhere; take one of {known}", ExitCode.USAGE
        )
    if match is None and word != "none":
        raise CapaError(
            f"--quantize {word}: must be none, int4, or int4 with a group, as int4:64; all but none may end in /rtn",
            ExitCode.USAGE,
        )
    return word  # pyright: ignore[reportReturnType]  # Both patterns are those of the literal.


def rounding_group(word: str | None) -> int | None:
    """Inputs of a group where weights are to be rounded to INT4; None where they are not."""
    match = _WORD.fullmatch(word or "")
    return int(match[1] or GROUPS[-1]) if match else None


def looks_at_samples(word: str | None) -> bool:
    """Whether samples decide what weights are rounded to."""
    match = _WORD.fullmatch(word or "")
    return match is not None and match[2] is None


def check_groups(word: str | None, decoder: DecoderDims) -> None:
    """Refuse groups that do not divide the inputs of every layer whose weights are to be rounded.

    Raises:
        CapaError: they do not.
    """
    group, attended = rounding_group(word), decoder.num_heads * decoder.head_dim
    if group is None:
        return
    sizes = {"hidden_size": decoder.hidden_size, "the heads together": attended}
    for name, size in {**sizes, "intermediate_size": decoder.intermediate_size}.items():
        if size % group:
            raise CapaError(
                f"--quantize {word}: groups of {group} inputs do not divide {name}, {size}; choose another group, as "
                "int4:32, or leave it away",
                ExitCode.USAGE,
            )
