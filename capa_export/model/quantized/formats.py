"""Finds the format of a quantized checkpoint by its `config.json`, or by ModelOpt's file beside it."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from capa_export.base.dims import Section
from capa_export.base.weight_types import WEIGHT_TYPES
from capa_export.model.quantized import modelopt
from capa_export.model.quantized.awq import Awq
from capa_export.model.quantized.compressed_tensors import PackQuantized
from capa_export.model.quantized.fp8_blocks import Fp8Blocks
from capa_export.model.quantized.gptq import Gptq
from capa_export.model.quantized.parts import Format

__all__ = ["FOREIGN", "HF_QUANT_CONFIG", "KEY", "TEXT_SECTIONS", "find_format", "int4_group"]

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


def int4_group(form: Format | None) -> int | None:
    """Inputs that share a scale, where graphs hold a format's numbers as they are, as far as its settings say."""
    group = None
    if isinstance(form, Awq | modelopt.Int4Awq):
        group = form.group
    elif isinstance(form, Gptq | PackQuantized):
        group = form.group if form.bits == 4 and not (isinstance(form, Gptq) and form.ordered) else None
    return group if group in WEIGHT_TYPES["int4"].groups else None


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
