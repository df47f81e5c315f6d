"""Accuracy against ratio: every selector at its own place."""

from collections.abc import Sequence

from benchmarks.selection.bed import SelectionBed
from benchmarks.selection.figures import AccuracyFigures
from benchmarks.selection.measure.compare import at_own_places, compared

__all__ = ["measure", "prefills"]

RATIOS = (0.25, 0.5, 0.75, 0.9, 0.95)
SCALED = (0.75, 0.9)
"""Ratios that are asked with FFN scales too."""


def measure(bed: SelectionBed, selectors: Sequence[str], count: int) -> AccuracyFigures:
    """Measure each selector against dense and against capa; with scales against full FFNs, too."""
    pairs: dict[str, dict[str, str]] = {}
    every: list[str] = []
    for ffn, ratios in (("full", RATIOS), ("scale", SCALED)):
        for ratio in ratios:
            (capa, *texts) = at_own_places(bed, ["capa", *selectors], [ratio], ffn)
            texts = list(dict.fromkeys((capa, *texts)))
            every += texts
            for text in texts:
                pairs[text] = {} if text == capa else {"capa": capa}
                if ffn == "scale":
                    pairs[text]["full"] = f"{text.removesuffix('/scale')}/full"
    return AccuracyFigures(layers=bed.layers, rows=compared(bed, every, count, pairs))


def prefills(num_selectors: int) -> int:
    """A question's."""
    return 1 + num_selectors * (len(RATIOS) + len(SCALED))
