"""What became of a checkpoint's quantized layers in the graphs: kept in four bits, or expanded, and why."""

from collections import Counter
from pathlib import Path
from typing import Any

import onnx_ir as ir

from capa_export.config.recipe import ranges
from capa_export.model.quantized.tensor import QuantizedTensor, quantization
from capa_export.model.source import Source
from capa_export.passes.pack_weights import packed_forms

__all__ = ["packing", "packing_words"]

_SCORED = "a score reads them whole"
_AS_ASKED = "as asked"


def packing(source: Source, prefill: Path) -> dict[str, Any] | None:
    """How the quantized layers of a checkpoint stand in the graphs; None where it has none.

    Args:
        source: the checkpoint.
        prefill: the graph of prompts, as it was written.
    """
    said = quantization(source.tensors.values())
    if said is None:
        return None
    forms = packed_forms(ir.load(prefill).graph)
    reasons = [_why(source, tensor) for name, tensor in source.quantized.items() if name not in forms]
    return {
        "layers": said,
        "packed": len(forms),
        "plain": [] if source.choice is None else list(source.choice.plain),
        "group": next((form.group for form in forms.values()), None),
        "expanded": dict(sorted(Counter(reasons).items())),
    }


def _why(source: Source, tensor: QuantizedTensor) -> str:
    """Why a layer was expanded."""
    if source.quantize == "none":
        return _AS_ASKED
    form = tensor.block_form()
    return form if isinstance(form, str) else _SCORED


def packing_words(packing: dict[str, Any], precision: str) -> str:
    """The same in words."""
    kept = [f"{packing['packed']} kept in 4 bits"] if packing["packed"] else []
    gone = [f"{count} expanded to {precision} ({reason})" for reason, count in packing["expanded"].items()]
    plain = f"; decoder layers {ranges(packing['plain'])} stay {precision}" if packing.get("plain") else ""
    return f"{packing['layers']}: {', '.join([*kept, *gone])}{plain}; inputs not quantized"
