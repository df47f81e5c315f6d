"""`evaluation.json`, as it is written: every method's score, and how sure its difference to dense is."""

from typing import Literal

from pydantic import Field

from capa_export.base.statistics import Difference, Figure, Rate
from capa_export.base.toml import Settings

__all__ = ["Evaluation", "Scored", "Skipped"]


class Scored(Settings):
    """One method, on all questions."""

    method: str
    """As it was written."""
    score: Rate | None = None
    """Mean of the metric with its 95 % interval; None where no right answers are known, as all that compares scores."""
    exact: Rate | None = None
    """Share of exact matches, normalised; None where the answers are letters of options."""
    to_dense: Difference | None = None
    """Score minus dense's; None for dense itself."""
    to_first: Difference | None = None
    """Score minus that of the first method beside dense; None for that one and for dense."""
    same_answer: Rate | None = None
    """Share of the answers that are dense's, word for word; None for dense itself, as `kl`."""
    kl: Figure = None
    """KL(dense || this) of the first token, in nats, mean."""
    kept: float
    """Mean share of the visual tokens after the last stage."""
    kinds: dict[str, Rate] = Field(default_factory=dict)
    """Kind of question -> score."""
    figures: dict[str, float] = Field(default_factory=dict)
    """POPE's precision, recall, f1 and yes_ratio."""


class Skipped(Settings):
    """A row that could not be asked."""

    row: int
    """From 0, in the file or folder."""
    reason: str


class Evaluation(Settings):
    """All that was found."""

    version: Literal[1] = 1
    model: str
    """Where it is from."""
    runs: Literal["eager fp32", "onnx"]
    data: str
    benchmark: str
    metric: Literal["exact", "vqa", "pope", "option"]
    questions: int
    """Answered by every method."""
    answered: int
    """Those of them whose right answer is known: what scores are over."""
    skipped: tuple[Skipped, ...]
    methods: tuple[Scored, ...]
    """Dense first."""
    max_new_tokens: int
    seed: int
    notes: tuple[str, ...] = ()
