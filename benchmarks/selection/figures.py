"""The JSON of each part: what was measured on one bed, and how."""

import os
import platform
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import Field, ValidationError

from capa_export.base.errors import CapaError
from capa_export.base.statistics import Difference
from capa_export.base.toml import Settings, first_problem
from capa_export.study.evaluate.schema import MethodScores

__all__ = [
    "AccuracyFigures",
    "Conditions",
    "Contest",
    "Contests",
    "Drift",
    "FFNFigures",
    "FigureRecord",
    "LayerFigures",
    "Linearity",
    "RankAgreement",
    "Row",
    "ScoreDifference",
    "SinkDefinition",
    "SinkFigures",
    "SinkLayer",
    "Spread",
    "Stability",
    "conditions",
    "read_record",
]

_PACKAGES = ("torch", "transformers", "numpy")


class Conditions(Settings):
    """The conditions of a measurement."""

    command: str
    date: str
    device: str
    versions: dict[str, str]
    checkpoint: str
    """First digits of the SHA-256 of config and weights."""
    questions: int
    seed: int


def conditions(command: str, *, checkpoint: str, questions: int, seed: int) -> Conditions:
    """The conditions of a measurement that is made here and today."""
    return Conditions(
        command=command,
        date=datetime.now(timezone.utc).date().isoformat(),
        device=_device(),
        versions={"capa-export": version("capa-export"), **{name: version(name) for name in _PACKAGES}},
        checkpoint=checkpoint[:12],
        questions=questions,
        seed=seed,
    )


def _device() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, eager FP32, no GPU"


class ScoreDifference(Settings):
    """A method's score minus another's, on the same questions."""

    method: str
    all: Difference
    kinds: dict[str, Difference]


class Row(Settings):
    """One method's scores."""

    scored: MethodScores
    flops: float
    """Prefill, as a share of dense, of one picture with its question."""
    against: dict[str, ScoreDifference] = Field(default_factory=dict)
    """Differences by what the other method stands for: `capa`, `random`, `full`, `scale`."""


class AccuracyFigures(Settings):
    """Accuracy of some methods, dense first."""

    layers: int
    """Layers of the decoder."""
    rows: tuple[Row, ...]

    @property
    def dense(self) -> MethodScores:
        return self.rows[0].scored


class FFNFigures(AccuracyFigures):
    """Accuracy with each treatment of visual FFNs."""

    eta: float
    """The recipe's."""
    linear: dict[str, tuple[int, ...]]
    """Layers that calibration finds linear, by eta as it is written in the method."""
    per_image: tuple[float, ...]
    """Share of the prompts on which a layer is linear, by layer."""


class Contest(Settings):
    """Methods of equal cost."""

    like: str
    """The method that says what all may cost."""
    budget: float
    """Prefill FLOPs, as a share of dense, over the samples of `tune`."""
    own: str | None
    """The recipe's, as late in the decoder as that allows; None where nothing does."""
    listed: dict[str, str]
    """Every selector at its own place."""
    tuned: str
    """The method that `tune` found to agree best with dense."""
    others: tuple[str, ...]
    """The other finalists of `tune`."""
    verdict: str
    """The verdict of `tune`."""
    tried: int
    samples: int


class Contests(AccuracyFigures):
    """All of them."""

    contests: tuple[Contest, ...]

    def row(self, method: str) -> Row:
        return next(row for row in self.rows if row.scored.method == method)


class Spread(Settings):
    """A figure over tokens."""

    mean: float
    p05: float
    p25: float
    p50: float
    p75: float
    p95: float
    below: float
    """Share of the tokens at eta or below."""


class LayerFigures(Settings):
    """cosine(x, x + FFN(norm(x))) of one layer."""

    visual: Spread
    text: Spread
    alpha_error: float
    """|| y - alpha x || / || y || over visual tokens that calibration has not seen."""
    calibration_error: float
    """The `alpha_error` over visual tokens that calibration has seen."""
    linear: bool
    """Whether the calibration calls the layer linear, at eta."""


class Linearity(Settings):
    """Cosines of all layers."""

    eta: float
    visual_tokens: int
    text_tokens: int
    layers: tuple[LayerFigures, ...]


class SinkLayer(Settings):
    """The sinks of one layer, and the other visual tokens beside them."""

    sinks: int
    contribution: float | None = None
    """Median of the sinks' over that of the others."""
    coefficient: float | None = None
    """Coefficient of bimodality; None where there are too few sinks."""
    split: float | None = None
    """Share of the variance that lies between two groups."""


class SinkDefinition(Settings):
    """A definition of sinks, and the figures of the tokens that meet it."""

    name: str
    says: str
    layers: tuple[SinkLayer, ...]
    histogram: tuple[tuple[float, ...], tuple[float, ...]]
    """Share of the sinks and of the others in each bin, all layers."""

    @property
    def count(self) -> int:
        return sum(layer.sinks for layer in self.layers)


class SinkFigures(Settings):
    """Sinks of all layers, by several definitions."""

    hidden_size: int
    visual_tokens: int
    max_phi: tuple[float, ...]
    """Largest of any visual token, by layer."""
    channels: tuple[int, ...]
    """Sink channels that the calibration found."""
    edges: tuple[float, ...]
    """Edges of the histograms' bins: log10 of the contribution over the layer's and prompt's median."""
    definitions: tuple[SinkDefinition, ...]


class RankAgreement(Settings):
    """Scores by the query of a generated token against those by the last prompt token; means over the prompts."""

    score: str
    """`capa` or `attention`."""
    layer: int
    step: int
    """Tokens generated before: at least 1."""
    prompts: int
    spearman: float
    overlap_quarter: float
    """Share of the best quarter that is in both."""
    overlap_tenth: float


class Drift(Settings):
    """Hellinger distance of pruned and full next-token distributions, step by step."""

    selector: str
    ratio: float
    steps: tuple[Difference, ...]
    """Mean over the prompts with its interval."""
    to_capa: Difference | None = None
    """Mean over a prompt's steps, minus capa's."""


class Stability(Settings):
    """Figures on how the choice of the last prompt token fares at the tokens after it."""

    layer: int
    """Layer where capa prunes."""
    prompts: tuple[int, ...]
    """Number of prompts that have a step of this number."""
    agreement: tuple[RankAgreement, ...]
    drift: tuple[Drift, ...]


T = TypeVar("T", bound=Settings)


class FigureRecord(Settings, Generic[T]):
    """A file."""

    about: Conditions
    figures: T


def read_record(path: Path, figures: type[T]) -> FigureRecord[T]:
    """Read the record of a part.

    Raises:
        CapaError: the file holds something else.
    """
    record: Any = FigureRecord[figures]
    try:
        return record.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise CapaError(f"{path}: {first_problem(error, record)}; measure it again") from error
