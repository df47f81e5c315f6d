"""What weights are rounded to, as `--quantize`, `--quantize-head`, `--quantize-vision` and recipes say it."""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, cast

from capa_export.base.dims import DecoderDims
from capa_export.base.errors import CapaError, ExitCode
from capa_export.base.weight_types import WEIGHT_TYPES, NumberKind, PackedLayers

__all__ = [
    "TYPES",
    "HeadQuantization",
    "Quantization",
    "VisionQuantization",
    "check_groups",
    "looks_at_samples",
    "parse_head_quantization",
    "parse_quantization",
    "parse_vision_quantization",
    "rounding",
]

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
HeadQuantization = Literal["none", "int4", "int4:32", "int4:64", "int4:128", "int8", "fp8"]
"""What the weight of the LM head is rounded to, to nearest; none leaves it as the checkpoint has it."""
VisionQuantization = Literal["none", "int8", "fp8"]
"""What the weights of the vision tower's blocks are rounded to, to nearest."""
TYPES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"--quantize": (*WEIGHT_TYPES,), "--quantize-head": ("int8", "int4", "fp8"), "--quantize-vision": ("int8", "fp8")}
)
"""The types that each option takes."""
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
    if match:
        _check_group("--quantize", match)
    return cast("Quantization", word)


def parse_head_quantization(word: str) -> HeadQuantization:
    """The word of `--quantize-head`, found to be one that is known.

    Raises:
        CapaError: it is not.
    """
    match, option = _WORD.fullmatch(word), "--quantize-head"
    if word != "none" and (match is None or match[1] not in TYPES[option] or match[3]):
        known = ", ".join(TYPES[option])
        raise CapaError(
            f"{option} {word}: must be none, {known}, or int4 with a group, as int4:64; a head is rounded to nearest",
            ExitCode.USAGE,
        )
    if match:
        _check_group(option, match)
    return cast("HeadQuantization", word)


def parse_vision_quantization(word: str) -> VisionQuantization:
    """The word of `--quantize-vision`, found to be one that is known.

    Raises:
        CapaError: it is not.
    """
    option = "--quantize-vision"
    if word != "none" and word not in TYPES[option]:
        raise CapaError(f"{option} {word}: must be none, {' or '.join(TYPES[option])}", ExitCode.USAGE)
    return cast("VisionQuantization", word)


def _check_group(option: str, match: re.Match[str]) -> None:
    """Refuse a group that the type does not have."""
    if not match[2]:
        return
    kind = WEIGHT_TYPES[match[1]]
    if len(kind.groups) < 2:
        size = f"groups of {kind.groups[0]}" if kind.groups else "one scale an output"
        raise CapaError(f"{option} {match[0]}: {kind.name} has {size}; say {match[1]} alone", ExitCode.USAGE)
    if int(match[2]) not in kind.groups:
        known = ", ".join(map(str, kind.groups))
        raise CapaError(
            f"{option} {match[0]}: groups of {match[2]} are multiplied nowhere; take one of {known}", ExitCode.USAGE
        )


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


def check_groups(layers: str | None, head: str, decoder: DecoderDims) -> None:
    """Refuse groups that do not divide the inputs of every weight that is to be rounded.

    Args:
        layers: what those of the decoder's layers are to be.
        head: what that of the LM head is to be.
        decoder: of the model.

    Raises:
        CapaError: they do not, or two numbers of 4 bits do not make an octet.
    """
    sizes = {"hidden_size": decoder.hidden_size}
    attended = {"the heads together": decoder.num_heads * decoder.head_dim}
    _check_divides("--quantize", layers, {**sizes, **attended, "intermediate_size": decoder.intermediate_size})
    _check_divides("--quantize-head", head, sizes)
    if (form := rounding(head)) is not None and form.type.bits == 4 and decoder.vocab_size % 2:
        raise CapaError(
            f"--quantize-head {head}: vocab_size is {decoder.vocab_size}, and numbers of 4 bits go by twos; take int8",
            ExitCode.USAGE,
        )


def _check_divides(option: str, word: str | None, sizes: Mapping[str, int]) -> None:
    form = rounding(word)
    if form is None or form.group is None:
        return
    for name, size in sizes.items():
        if size % form.group:
            raise CapaError(
                f"{option} {word}: groups of {form.group} inputs do not divide {name}, {size}; choose another group, "
                "as int4:32, or leave it away",
                ExitCode.USAGE,
            )
