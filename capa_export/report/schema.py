"""`parity.json`, as it is written and read: the verdict, and the three questions it rests on, never mixed.

Figures that are not finite are null. As a program, prints the JSON Schema that `docs/parity.schema.json` holds.
"""

import json
import sys
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from capa_export.base.errors import CapaError
from capa_export.base.statistics import Difference, Entry, Figure, Rate
from capa_export.base.toml import first_problem

__all__ = [
    "PROMPTS",
    "Answers",
    "Bisection",
    "Check",
    "ExportError",
    "Kept",
    "LayerError",
    "Method",
    "MethodError",
    "ParityReport",
    "Probe",
    "QuantizationError",
    "Selection",
    "read_parity",
    "write_parity",
]


_FEW = 20
"""Questions below which a share is written as a count."""
PROMPTS = "prompts"
"""Artefact: what tokenizer and image processor make of the samples."""


class Check(Entry):
    """One figure and what is asked of it."""

    name: str
    value: Figure
    """Worst over all prompts and steps."""
    at_most: float | None = None
    at_least: float | None = None
    """At most one of the two is given; where neither is, nothing is asked."""
    of: int | None = None
    """Where the figure is a count: out of how many."""
    healthy: float | None = None
    """Worst that healthy exports have shown: what the bound rests on."""
    noise: Figure = None
    """The eager model's own figure in this precision, where it was measured: the bound leaves room for a multiple."""
    failure: str = ""
    """One sentence where the bound is not met."""


class LayerError(Entry):
    """The hidden states that leave a decoder layer, all steps of all prompts that were replayed."""

    layer: int
    relative_error: Figure
    """|| difference || / || reference ||, worst prompt."""
    cosine: Figure
    """Smallest of a token."""
    norm_ratio: Figure
    """Largest | |x| / |reference| - 1 | of a token."""
    noise: Figure
    """Relative error of the eager model itself in this precision; 0 for FP32."""


class ExportError(Entry):
    """What the export cost: an artefact against a reference, with the same visual tokens kept on both sides."""

    artefact: str
    """As `fp16 ONNX`."""
    reference: str
    """As `eager CAPA fp32`."""
    prompts: int
    steps: int
    """Of all prompts together: prefill, and every token fed after it."""
    noise: Figure
    """Largest logit difference that the eager model itself shows in this precision; 0 for FP32."""
    checks: tuple[Check, ...]
    layers: tuple[LayerError, ...] = ()
    """Of prompts that were replayed; none for engines, whose inside cannot be seen."""


class Kept(Entry):
    """The tokens that one stage of the schedule kept, of those that entered it on both sides."""

    layer: int
    """First without the dropped tokens' keys; -1 where they are dropped before the decoder."""
    selector: str = "capa"
    iou_mean: Figure
    iou_min: Figure
    iou_bound: Figure
    """Mean over the prompts of the least IoU that the noise of the scores explains; for a selector that chooses step by
    step, the least mean that the precision's own flips explain."""
    margin_min: Figure
    margin_median: Figure
    """Lead of the worst token kept over the best one dropped, relative to the former: over the prompts; null where
    scores are ranks."""
    score_noise: Figure
    """Largest relative change of a score near the cut that the precision alone makes."""
    flipped: int
    """Prompts on which another token was kept."""


class Selection(Entry):
    """Whether an artefact keeps the reference's visual tokens."""

    artefact: str
    reference: str
    prompts: int
    stages: tuple[Kept, ...]
    checks: tuple[Check, ...]


class Method(Entry):
    """What one way of pruning does to the answers."""

    name: Literal["dense", "capa", "random"]
    accuracy: Rate | None = None
    """None where the answers are not known."""
    top1: Rate | None = None
    """First tokens that are dense's; None for dense itself, as all that follows."""
    top5: float | None = None
    """Mean share of dense's five likeliest first tokens that are among this one's five."""
    kl: Figure = None
    """KL(dense || this) of the first token, in nats, mean."""
    same_answer: Rate | None = None
    """Answers without a token that differs from dense's."""
    diverges_at: float | None = None
    """Mean index of the first token that differs, of the answers that have one."""


class MethodError(Entry):
    """What the method itself costs, in eager FP32: dense, CAPA, and random pruning at the same k."""

    questions: int
    pruned: str = "CAPA"
    """What chose the tokens, for people; below, and in `methods`, CAPA stands for it."""
    methods: tuple[Method, ...] = ()
    """None where no question was asked."""
    kl_gain: Difference | None = None
    """KL of random minus KL of CAPA, in nats: above 0 CAPA is closer to dense."""
    accuracy_gain: Difference | None = None
    """Accuracy of CAPA minus that of random."""
    beats_random: bool | None = None
    """Whether the interval of `kl_gain` lies above 0; None where too little was asked, or nothing removed, to tell."""
    words: tuple[str, ...] = ()
    """What the figures say, a sentence each."""

    def label(self, method: str) -> str:
        """Of one of the methods, for people."""
        return {"capa": self.pruned, "random": "random, same k"}.get(method, method)


class Answers(Entry):
    """Whether the method, in eager FP32, keeps dense's answers."""

    same: int
    """Questions that are answered as dense answers them."""
    questions: int
    least_agreement: float
    """Least share of them that the recipe asks for."""
    accepted: bool
    """Whether the user takes whatever it is."""

    @property
    def passed(self) -> bool:
        """Whether the share is met."""
        return self.same >= self.least_agreement * self.questions

    @property
    def words(self) -> str:
        """As `98 % as dense`, and what follows from it."""
        share, least = (f"{100 * value:.3g} %" for value in (self.same / self.questions, self.least_agreement))
        few = self.questions < _FEW
        found = f"{self.same} of {self.questions} as dense" if few else f"{share} as dense"
        if self.passed:
            return found
        return f"{found}: {'accepted' if self.accepted else 'not fit to ship'}, {least} are asked for"


class QuantizationError(Entry):
    """What rounding the weights cost, in eager FP32 and without pruning: along the answers of full precision."""

    weights: str
    """What was rounded to what, for people."""
    prompts: int
    kl: Figure
    """KL(full precision || this) of the next token, in nats, mean over an answer's first tokens and the prompts."""
    kl_max: Figure
    """The same of the worst prompt."""
    top1: Figure
    """Mean share of next tokens that are those of full precision."""


class Probe(Entry):
    """One place that a bisection looked at."""

    name: str
    """Of the layer, block or node."""
    relative_error: Figure
    limit: float
    """What the precision explains."""
    clean: bool


class Bisection(Entry):
    """Where an artefact leaves the oracle."""

    artefact: str
    graph: str
    """File, relative to the `onnx` folder."""
    layer: str
    """As `layers.3` or `visual.blocks.2`; empty where the fault has no layer."""
    block: str
    """As `self_attn`; empty where the fault has none."""
    node: str
    """The first operator with good inputs and a bad output; empty where there is none."""
    sentence: str
    fp32_layers: tuple[str, ...] = ()
    """What would remove it, in the words of `--fp32-layers`; empty where FP32 is no remedy."""
    probes: tuple[Probe, ...]


class Stage(Entry):
    """One entry of the schedule."""

    layer: int
    """First without the dropped tokens' keys; -1 where they are dropped before the decoder."""
    ratio: float
    selector: str = "capa"
    options: dict[str, float] = Field(default_factory=dict)


class ParityReport(Entry):
    """All that validation found."""

    version: Literal[2] = 2
    passed: bool
    failures: tuple[str, ...]
    """A sentence per check that failed."""
    warnings: tuple[str, ...]
    """What is not as it should be, and no gate forbids; failures where `strict`."""
    strict: bool
    oracle: Literal["eager", "golden"]
    """Run now, or as it was when the golden samples were stored."""
    prompts: str
    """Where they came from."""
    num_prompts: int
    seed: int
    gates: str = ""
    """SHA-256 of the file whose bounds stood in place of the recipe's; empty where none did."""
    prompts_sha256: str = ""
    """Over pictures and questions; empty where the golden samples stood for them."""
    schedule: tuple[Stage, ...]
    linear_layers: tuple[int, ...]
    fp32_layers: tuple[str, ...]
    export_error: tuple[ExportError, ...]
    selection: tuple[Selection, ...]
    method_error: MethodError
    quantization_error: QuantizationError | None = None
    """None where no weights were rounded: a checkpoint that was published quantized has no others."""
    answers: Answers | None = None
    """The verdict on the method; None where no question was asked, or the eager model was not run."""
    bisection: Bisection | None = None
    notes: tuple[str, ...]

    @property
    def fit(self) -> bool:
        """Whether the bundle is fit to ship: right, and its method keeps the answers, or its loss is accepted."""
        return self.passed and (self.answers is None or self.answers.passed or self.answers.accepted)


def write_parity(path: Path, parity: ParityReport) -> None:
    """Write a report as JSON without NaN."""
    path.write_text(json.dumps(parity.model_dump(mode="json"), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_parity(path: Path) -> ParityReport:
    """Read a report that `write_parity` wrote.

    Raises:
        CapaError: the file is missing, or is no report of this version.
    """
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
        return ParityReport.model_validate(found)
    except FileNotFoundError as error:
        raise CapaError(f"{path}: no such file; `capa-export validate` writes it") from error
    except (OSError, ValueError, RecursionError) as error:
        problem = first_problem(error, ParityReport) if isinstance(error, ValidationError) else str(error)
        raise CapaError(f"{path}: is no parity report of version 2 ({problem}); validate the bundle again") from error


if __name__ == "__main__":
    sys.stdout.write(json.dumps(ParityReport.model_json_schema(mode="serialization"), indent=2) + "\n")
