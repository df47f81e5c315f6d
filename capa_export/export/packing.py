"""What became of a checkpoint's quantized layers in the graphs: kept in few bits, or expanded, and why."""

from collections import Counter
from pathlib import Path
from typing import Any

import onnx_ir as ir

from capa_export.base.weight_types import WEIGHT_TYPES
from capa_export.config.recipe import ranges
from capa_export.model.quantized.tensor import HEAD, QuantizedTensor, quantization
from capa_export.model.source import Source
from capa_export.passes.pack_weights import packed_forms

__all__ = ["packing", "packing_words"]

_SCORED = "a score reads them whole"


def packing(source: Source, folder: Path) -> dict[str, Any] | None:
    """How the quantized layers of a checkpoint stand in the graphs; None where it has none.

    Args:
        source: the checkpoint.
        folder: of the graphs, as they were written.
    """
    said = quantization(source.tensors)
    if said is None:
        return None
    forms = packed_forms(ir.load(folder / "llm" / "prefill.onnx").graph)
    tower = packed_forms(ir.load(folder / "visual" / "model.onnx").graph) if source.rounded_tower else {}
    reasons = [_why(source, tensor) for name, tensor in source.quantized.items() if name not in forms | tower]
    head = forms.pop(HEAD, None)
    return {
        "layers": said,
        "packed": len(forms),
        "plain": [] if source.choice is None else list(source.choice.plain),
        "type": next((form.kind for form in forms.values()), None),
        "group": next((form.group for form in forms.values()), None),
        "zeros": any(form.has_zeros for form in forms.values()),
        "expanded": dict(sorted(Counter(reasons).items())),
        "head": None if head is None else {"type": head.kind, "group": head.group},
        "vision": {"packed": len(tower), "type": next(iter(tower.values())).kind} if tower else None,
    }


def _why(source: Source, tensor: QuantizedTensor) -> str:
    """Why a layer was expanded."""
    form = source.form_of(tensor)
    return form if isinstance(form, str) else _SCORED


def packing_words(packing: dict[str, Any], precision: str) -> str:
    """The same in words."""
    kept = [f"{packing['packed']} kept in {WEIGHT_TYPES[packing['type']].bits} bits"] if packing["packed"] else []
    if head := packing.get("head"):
        kept.append(f"the LM head kept in {WEIGHT_TYPES[head['type']].bits} bits")
    if tower := packing.get("vision"):
        kept.append(f"{tower['packed']} of the vision tower kept in {WEIGHT_TYPES[tower['type']].bits} bits")
    gone = [f"{count} expanded to {precision} ({reason})" for reason, count in packing["expanded"].items()]
    plain = f"; decoder layers {ranges(packing['plain'])} stay {precision}" if packing.get("plain") else ""
    return f"{packing['layers']}: {', '.join([*kept, *gone])}{plain}; inputs not quantized"
