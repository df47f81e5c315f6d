"""The result of `tune`, as `--json` prints it."""

from typing import Literal

from capa_export.base.statistics import Difference, Figure
from capa_export.base.toml import Settings

__all__ = ["Finalist", "Tuning"]


class Finalist(Settings):
    """A method's figures on the samples that judge."""

    method: str
    """The method as `evaluate` takes it."""
    linear_layers: tuple[int, ...]
    """Layers where a scale stands for the FFN of visual tokens."""
    flops: float
    """Share of dense's FLOPs in the decoder's prefill, over all samples."""
    kl: Figure
    """KL(dense || this) of the next token along dense's answer, in nats, mean."""
    top1: float
    """Share of next tokens that are dense's."""
    gain: Difference | None = None
    """KL of the recipe's own minus this one's; None for the recipe's own, and where there is none."""


class Tuning(Settings):
    """The whole result of a search."""

    version: Literal[1] = 1
    model: str
    """Source of the model."""
    budget: float
    """Share of dense's FLOPs."""
    dense_flops: float
    """Dense's FLOPs a prompt, mean over the samples."""
    text: float
    """Share of dense's FLOPs that text costs alone."""
    samples: int
    judges: int
    """Number of samples that the figures are on, and which chose no finalist."""
    tried: int
    """Number of methods tried."""
    own: str | None
    """The recipe's schedule within the budget; None where it meets it nowhere."""
    chosen: str
    """The finalist that was written."""
    finalists: tuple[Finalist, ...]
    """Best agreement first."""
    left_out: tuple[str, ...]
    """Selectors that the family cannot offer."""
    verdict: str
