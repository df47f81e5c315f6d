"""FastV (arXiv 2403.06764): by the attention of the layer before, dropped where the layer begins."""

from dataclasses import replace

from capa_export.selectors import attention

__all__ = ["SELECTOR"]

SELECTOR = replace(attention.SELECTOR, place="entry", layer=2)
