"""How the weights of a decoder's layers are quantized, as `--quantize` and recipes say it."""

import re
from typing import Literal, cast

from capa_export.base.dims import DecoderDims
from capa_export.base.errors import CapaError, ExitCode
from capa_export.base.weight_types import WEIGHT_TYPES, NumberKind, PackedLayers

__all__ = ["Quantization", "check_groups", "looks_at_samples", "parse_quantization", "rounding"]

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
    "int8",
    "fp8",
    "nvfp4",
]
"""Plain numbers whatever the checkpoint has, or a type of few bits; INT4 in groups of so many inputs, 128 if not said.

Samples decide what INT4 weights are rounded to; behind `/rtn` (round to nearest), and of other types, they are rounded
as they are.
"""
_WORD = re.compile(rf"({'|'.join(WEIGHT_TYPES)})(?::([1-9][0-9]*))?(/rtn)?")


def parse_quantization(word: str) -> Quantization:
    """The word, found to be one that is known.

    Raises:
        CapaError: it is not.
    """
    match = _WORD.fullmatch(word)
    if match is None and word != "none":
        known = ", ".join(WEIGHT_TYPES)
        raise CapaError(
            f"--quantize {word}: must be none, {known}, or int4 with a group, as int4:64; int4 may end in /rtn",
            ExitCode.USAGE,
        )
    if match and match[3] and match[1] != "int4":
        raise CapaError(f"--quantize {word}: {match[1]} is always rounded to nearest; say it alone", ExitCode.USAGE)
    if match and match[2]:
        kind = WEIGHT_TYPES[match[1]]
        if len(kind.groups) < 2:
            size = f"groups of {kind.groups[0]}" if kind.groups else "one scale an output"
            raise CapaError(f"--quantize {word}: {kind.name} has {size}; say {match[1]} alone", ExitCode.USAGE)
        if int(match[2]) not in kind.groups:
            known = ", ".join(map(str, kind.groups))
            raise CapaError(
                f"--quantize {word}: groups of {match[2]} are multiplied nowhere; take one of {known}", ExitCode.USAGE
            )
    return cast("Quantization", word)


def rounding(word: str | None) -> PackedLayers | None:
    """The type and the groups that plain weights are to be rounded to; None where they are not."""
    match = _WORD.fullmatch(word or "")
    if match is None:
        return None
    groups = WEIGHT_TYPES[match[1]].groups
    group = int(match[2]) if match[2] else groups[-1] if groups else None
    return PackedLayers(kind=cast("NumberKind", match[1]), group=group)


def looks_at_samples(word: str | None) -> bool:
    """Whether samples decide what weights are rounded to."""
    match = _WORD.fullmatch(word or "")
    return match is not None and match[1] == "int4" and match[3] is None


def check_groups(word: str | None, decoder: DecoderDims) -> None:
    """Refuse groups that do not divide the inputs of every layer whose weights are to be rounded.

    Raises:
        CapaError: they do not.
    """
    form, attended = rounding(word), decoder.num_heads * decoder.head_dim
    if form is None or form.group is None:
        return
    sizes = {"hidden_size": decoder.hidden_size, "the heads together": attended}
    for name, size in {**sizes, "intermediate_size": decoder.intermediate_size}.items():
        if size % form.group:
            raise CapaError(
                f"--quantize {word}: groups of {form.group} inputs do not divide {name}, {size}; choose another group, "
                "as int4:32, or leave it away",
                ExitCode.USAGE,
            )
