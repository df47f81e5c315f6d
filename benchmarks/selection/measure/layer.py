"""Accuracy against the layer: selectors inside the decoder, early, in the middle and late."""

from collections.abc import Sequence

from benchmarks.selection.bed import SelectionBed
from benchmarks.selection.figures import AccuracyFigures
from benchmarks.selection.measure.compare import compared
from capa_export.selectors.selector import load_selector

__all__ = ["inside", "measure", "prefills"]

LAYERS = (1, 2, 3, 5, 8, 10)
RATIOS = (0.75, 0.9)
_REFERENCES = ("capa", "random")


def inside(selectors: Sequence[str]) -> list[str]:
    """The selectors that act at a layer."""
    return [name for name in selectors if load_selector(name).place != "input"]


def measure(bed: SelectionBed, selectors: Sequence[str], count: int) -> AccuracyFigures:
    """Measure each selector against dense, and against capa and random at the same layer and ratio."""
    chosen = inside(selectors)
    layers = [layer for layer in LAYERS if layer < bed.layers - 1]
    texts = {
        (name, layer, ratio): f"{name}@{layer}:{ratio:g}/full"
        for layer in layers
        for ratio in RATIOS
        for name in chosen
    }
    pairs = {
        text: {
            other: texts[other, layer, ratio]
            for other in _REFERENCES
            if other != name and (other, layer, ratio) in texts
        }
        for (name, layer, ratio), text in texts.items()
    }
    return AccuracyFigures(layers=bed.layers, rows=compared(bed, list(texts.values()), count, pairs))


def prefills(num_selectors: int) -> int:
    """A question's, of those inside the decoder."""
    return 1 + num_selectors * len(LAYERS) * len(RATIOS)
