"""Finds the format of a quantized checkpoint by its `config.json`, or by ModelOpt's file beside it."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from capa_export.base.dims import Section
from capa_export.base.errors import CapaError
from capa_export.base.weight_types import NumberKind, PackedLayers
from capa_export.model.quantized import modelopt
from capa_export.model.quantized.awq import Awq
from capa_export.model.quantized.compressed_tensors import PackQuantized
from capa_export.model.quantized.fp8_blocks import Fp8Blocks
from capa_export.model.quantized.gptq import Gptq
from capa_export.model.quantized.parts import Format

__all__ = ["FOREIGN", "HF_QUANT_CONFIG", "KEY", "TEXT_SECTIONS", "find_format", "held"]

KEY = "quantization_config"
"""Key of the settings in `config.json`."""
TEXT_SECTIONS = ("text_config", "llm_config")
"""Sections of a decoder, in which some tools put the key."""
HF_QUANT_CONFIG = "hf_quant_config.json"
"""File of ModelOpt's settings."""
_VISION = "vision_config"

_READERS: Mapping[str, Callable[[Section], Format]] = MappingProxyType(
    {
        "awq": Awq.read,
        "gptq": Gptq.read,
        "compressed-tensors": PackQuantized.read,
        "modelopt": modelopt.read,
        "fp8": Fp8Blocks.read,
    }
)
_FORMATS = (Awq, Gptq, PackQuantized, modelopt.Fp8, modelopt.Int4Awq, modelopt.Nvfp4, Fp8Blocks)
FOREIGN = frozenset(part for form in _FORMATS for part in (*form.REQUIRED, *form.OPTIONAL)) - {"weight"}
"""Last words of the names of tensors that only quantized layers have, in some format."""


def find_format(config: Mapping[str, Any], where: str, beside: Section | None = None) -> Format | None:
    """The format of a checkpoint's weights; None where they are plain numbers.

    Args:
        config: `config.json`.
        where: its name in error messages.
        beside: `HF_QUANT_CONFIG`, where there is one.

    Raises:
        CapaError: the format is not known or not supported, or several are named.
    """
    root = Section(config, where, "")
    if isinstance(vision := config.get(_VISION), dict) and vision.get(KEY) is not None:
        raise root.section(_VISION).refused(KEY, "a vision tower with a format of its own is not supported")
    sections = [root, *(root.section(name) for name in TEXT_SECTIONS if isinstance(config.get(name), dict))]
    given = [section.section(KEY) for section in sections if section.data.get(KEY) is not None]
    if any(other.data != given[0].data for other in given):
        raise root.refused(KEY, f"differs from {given[1].name}; only one format in a checkpoint is supported")
    form = _read(given[0]) if given else None
    if beside is None:
        return form
    published = modelopt.read(beside.section("quantization"))
    if form is not None and form.name != published.name:
        raise root.refused(KEY, f"is {form.name}, but {beside.where} says {published.name}; only one is supported")
    return published


def held(form: Format, asked: PackedLayers | None, where: str) -> PackedLayers | None:
    """What graphs hold a format's numbers in as they are, as far as its settings say; None where these are expanded.

    Args:
        form: of the checkpoint.
        asked: a type that is to stay; nothing where only INT4 does.
        where: name of its settings in error messages.

    Raises:
        CapaError: another type is asked for than the checkpoint has, or one that stays without being asked for.
    """
    kind, group = _numbers(form)
    if asked is not None and (asked.type.stays or asked.kind != kind):
        raise CapaError(
            f"{where}: the checkpoint is quantized already ({form.name}); leave --quantize away, or take the "
            "checkpoint it was made from"
        )
    has_zeros = isinstance(form, Awq) or (isinstance(form, Gptq | PackQuantized) and not form.symmetric)
    found = PackedLayers(kind=kind, group=group, has_zeros=has_zeros)
    fits = group in found.type.groups if found.type.groups else group is None
    ordered = isinstance(form, Gptq) and form.ordered
    stays = asked is not None or found.type.stays
    return found if fits and stays and not ordered and not isinstance(form, Fp8Blocks) else None


def _numbers(form: Format) -> tuple[NumberKind, int | None]:
    """The type of a format's numbers, and the inputs that share a scale."""
    if isinstance(form, Gptq | PackQuantized):
        return "int4" if form.bits == 4 else "int8", form.group
    if isinstance(form, modelopt.Fp8 | Fp8Blocks):
        return "fp8", None
    assert isinstance(form, Awq | modelopt.Int4Awq | modelopt.Nvfp4), form
    return "nvfp4" if isinstance(form, modelopt.Nvfp4) else "int4", form.group


def _read(settings: Section) -> Format:
    method = settings.data.get("quant_method")
    if not isinstance(method, str) or method not in _READERS:
        what = "is missing" if method is None else f"is {method!r}"
        known = ", ".join(_READERS)
        raise settings.refused(
            "quant_method",
            f"{what}; known formats: {known}; or use the checkpoint in bf16, fp16 or fp32 it was made from",
        )
    return _READERS[method](settings)
