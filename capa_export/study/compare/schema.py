"""The result of comparing two bundles, as `compare --json` prints it; figures that are not finite are null.

The reference is what is deployed, the candidate what is to take its place.
"""

from typing import Any, Literal

from capa_export.base.statistics import Difference, Figure, Rate
from capa_export.base.toml import Settings
from capa_export.report.schema import Check

__all__ = [
    "AnswerComparison",
    "BundleComparison",
    "Change",
    "EngineChange",
    "EngineFacts",
    "FileSize",
    "KeptChange",
    "LogitChange",
    "Timing",
]


class Change(Settings):
    """Something recorded that differs; None where a bundle does not have it."""

    name: str
    """Path of the setting, as `recipe.prune.schedule.0.ratio`."""
    reference: Any
    candidate: Any


class KeptChange(Settings):
    """The visual tokens kept after one layer."""

    layer: int
    reference: float | None
    """Mean number over the prompts; None where nothing is dropped there."""
    candidate: float | None
    iou: float | None
    """Mean over the prompts; None where only one side drops there, or the prompts themselves differ."""


class LogitChange(Settings):
    """Next-token distributions, both sides fed the reference's greedy answer."""

    steps: int
    """Steps of all prompts together."""
    kl_mean: Figure
    """KL(reference || candidate), in nats."""
    kl_max: Figure
    top1: float
    """Share of the steps with the same likeliest token."""
    diverged: int
    """Prompts on which another token came first at some step."""
    diverges_at: int | None
    """The earliest step with another first token; None where there is none."""


class AnswerComparison(Settings):
    """Right answers of both sides."""

    source: Literal["asked now", "parity.json"]
    """Asked of these graphs, or what eager CAPA in FP32 answered when each bundle was validated."""
    questions: int
    reference: Rate
    candidate: Rate
    difference: Difference | None
    """Candidate minus reference, question by question; None where they were not asked side by side."""


class Timing(Settings):
    """Medians of one kind of work on this machine's processor, the two sides in turn."""

    what: Literal["vision", "prefill", "decode"]
    """`vision` and `prefill` of a prompt, `decode` of a token."""
    runs: int
    reference_ms: float
    candidate_ms: float
    ratio: float
    """Candidate over reference."""


class FileSize(Settings):
    """Bytes of a file; None where a bundle does not have it."""

    file: str
    reference: int | None
    candidate: int | None


class EngineFacts(Settings):
    """Facts about one engine."""

    bytes: int
    layers: int
    custom_layers: int
    """CAPA nodes that became plugin layers."""
    weight_copies: int


class EngineChange(Settings):
    """An engine of a target that both have engines for; one side lacks it where its decoder is one engine or two."""

    engine: str
    """Name of the engine, as `rtx/llm/prefill`."""
    reference: EngineFacts | None
    candidate: EngineFacts | None


class BundleComparison(Settings):
    """The whole comparison of two bundles."""

    version: Literal[1] = 1
    passed: bool
    failures: tuple[str, ...]
    """A sentence per check that failed."""
    reference: str
    candidate: str
    prompts: str
    """Source of the prompts."""
    num_prompts: int
    checks: tuple[Check, ...]
    changes: tuple[Change, ...]
    kept: tuple[KeptChange, ...]
    logits: LogitChange
    answers: AnswerComparison | None
    """Accuracy of both sides; None where no right answers are known."""
    timings: tuple[Timing, ...]
    sizes: tuple[FileSize, ...]
    engines: tuple[EngineChange, ...]
