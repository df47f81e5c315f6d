"""`evaluation.json`, as it is written: every method's score, and how sure its difference to dense is."""

from typing import Literal

from pydantic import Field

from capa_export.base.statistics import Difference, Figure, Rate
from capa_export.base.toml import Settings

__all__ = ["Evaluation", "MethodScores", "SkippedRow"]


class MethodScores(Settings):
    """One method's scores on all questions."""

    method: str
    """The method as the user wrote it."""
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


class SkippedRow(Settings):
    """A row that could not be asked."""

    row: int
    """Row number from 0, in the file or folder."""
    reason: str


class Evaluation(Settings):
    """The whole evaluation."""

    version: Literal[1] = 1
    model: str
    """Source of the model."""
    runs: Literal["eager fp32", "onnx"]
    data: str
    benchmark: str
    metric: Literal["exact", "vqa", "pope", "option"]
    questions: int
    """Questions that every method answered."""
    answered: int
    """Questions with a known right answer, which scores are over."""
    skipped: tuple[SkippedRow, ...]
    methods: tuple[MethodScores, ...]
    """Dense first."""
    max_new_tokens: int
    seed: int
    notes: tuple[str, ...] = ()
