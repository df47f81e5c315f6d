"""FastV (arXiv 2403.06764): by the attention of the layer before, dropped where the layer begins."""

from capa_export.selectors.attention import flops, reference, score
from capa_export.selectors.selector import Place, Prompted, Setting

__all__ = ["GRADED", "LAYER", "LEAST", "OPTIONS", "PLACE", "READS", "flops", "reference", "score"]

PLACE: Place = "entry"
LAYER = 2
GRADED = True
READS: tuple[Prompted, ...] = ()
LEAST = 1
OPTIONS: dict[str, Setting] = {}
