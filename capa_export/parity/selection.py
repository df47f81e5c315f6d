"""Measures whether an artefact keeps the oracle's visual tokens, and how far from the cut the others lie.

T = tokens that enter a stage, K = tokens kept.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import inf, isfinite

import numpy as np

from capa_export.config.gates import Bound, Gate
from capa_export.config.schedule import Stage
from capa_export.parity.distance import worse
from capa_export.parity.export_error import bounded
from capa_export.parity.records import Noise, Record, score_errors
from capa_export.parity.trace import Trace, overlap
from capa_export.report.schema import Check, Kept, Selection
from capa_export.selectors.selector import load_selector

__all__ = ["SelectionMeter", "comparable_kept"]


_WIDEST = 0.25
"""Relative lead of a score that is too wide for any noise to explain."""
_TIES = 0.02
"""Mean IoU that near-ties of a choice made step by step may cost where none were seen: about one token in fifty."""
_TIE_RATIO = 2.0
"""Most that near-ties may cost an artefact, in multiples of their cost to the eager model."""


@dataclass
class _StageFigures:
    """The figures of one stage of the schedule, over the prompts."""

    iou: list[float] = field(default_factory=list)
    bound: list[float] = field(default_factory=list)
    margin: list[float] = field(default_factory=list)
    furthest: float = 0.0
    score_error: float | None = None
    """Worst relative error of a score; None where the scores cannot be seen."""
    flipped: int = 0
    malformed: int = 0
    """Prompts whose kept positions are no choice: too few or many, not ascending, or not among those that entered."""
    chance: list[float] = field(default_factory=list)
    """Per prompt, the IoU that as many random tokens would have; of a choice made step by step."""


@dataclass
class SelectionMeter:
    """Collects the tokens that an artefact and the oracle keep, of those that entered a stage on both sides."""

    artefact: str
    reference: str
    schedule: Sequence[Stage]
    gate: Gate
    noise: Noise
    min_keep_per_image: int
    prompts: int = 0
    stages: list[_StageFigures] = field(init=False)

    def __post_init__(self) -> None:
        self.stages = [_StageFigures() for _ in self.schedule]

    def band(self, stage: int) -> float:
        """The largest relative lead of a score that the noise of the precision explains."""
        ratio, noise = self.gate.flip_noise_ratio, self.noise.scores
        measured = ratio.limit * noise[stage] if ratio is not None and noise else 0.0
        # A NaN leaves the floor, and nothing excuses keeping the worst tokens.
        return max(self.gate.flip_distance.limit, min(measured, _WIDEST) if isfinite(measured) else 0.0)

    def add(self, kept: Sequence[np.ndarray], record: Record, states: Trace | None = None) -> None:
        """Count one prompt.

        Args:
            kept: prompt positions that the artefact keeps, of each stage that the oracle's tokens enter.
            record: the oracle's record of the prompt.
            states: the artefact's trace while it keeps the oracle's tokens, where its scores were seen.
        """
        self.prompts += 1
        entering = np.arange(len(record.prompt.input_ids))
        for index, (own, wanted, scores) in enumerate(zip(kept, record.fp32.kept, record.fp32.scores, strict=False)):
            stage = self.stages[index]
            stage.iou.append(overlap(own, wanted, len(record.prompt.text_positions)))
            stage.flipped += not np.array_equal(own, wanted)
            if not self._graded(index):
                if len(own) != len(wanted) or (np.diff(own) <= 0).any() or not np.isin(own, entering).all():
                    stage.malformed += 1
                    stage.iou[-1] = 0.0
                num_text = len(record.prompt.text_positions)
                stage.chance.append((len(wanted) - num_text) / max(1, 2 * len(entering) - len(wanted) - num_text))
                entering = wanted
                continue
            cut = _Cutoff.of(entering, wanted, scores, record.prompt.is_visual, self.min_keep_per_image)
            stage.bound.append(cut.iou_bound(self.band(index)))
            stage.margin.append(cut.margin)
            if not np.array_equal(own, wanted):
                stage.furthest = worse(stage.furthest, _lead(own, wanted, entering, scores))
            entering = wanted
        if states is not None:
            errors = score_errors(record.prompt, record.fp32, states)
            for index, (stage, error) in enumerate(zip(self.stages, errors, strict=True)):
                if self._graded(index):
                    stage.score_error = worse(stage.score_error or 0.0, error)

    def warnings(self) -> tuple[str, ...]:
        """A sentence for each stage that was seen on no prompt, or whose near-ties hide a wrong choice."""
        hanging = (
            f"{self.artefact}: what {entry.selector} keeps {entry.where} hangs on the last bits of these pictures, so "
            "that its choice could not be judged; smaller pictures or a smaller ratio can be"
            for index, entry in enumerate(self.schedule)
            if self._hangs(index)
        )
        return *hanging, *(words for count, words in self._unseen() if count == self.prompts)

    def notes(self) -> tuple[str, ...]:
        """A sentence for each stage that was seen on some of the prompts."""
        return tuple(words for count, words in self._unseen() if count < self.prompts)

    def _unseen(self) -> Iterator[tuple[int, str]]:
        """The number of prompts on which a stage was not compared, and a sentence; of stages that have any."""
        for entry, stage in zip(self.schedule, self.stages, strict=True):
            if count := self.prompts - len(stage.iou):
                words = (
                    f"{self.artefact}: what {entry.selector} keeps {entry.where} was not compared on {count} of "
                    f"{self.prompts} prompts, where a stage before it kept other tokens than {self.reference}"
                )
                yield count, words

    def _graded(self, stage: int) -> bool:
        """Whether the stage's scores are amounts, which compare."""
        return load_selector(self.schedule[stage].selector).graded

    def _hangs(self, stage: int) -> bool:
        """Whether a choice made step by step hangs on the last bits: little tells the explained from chance."""
        chance = self.stages[stage].chance
        return bool(chance) and self._explained(stage, _TIES) < (1 + 2 * float(np.mean(chance))) / 3

    def _least(self, stage: int) -> float:
        """The least mean IoU of a choice made step by step that near-ties and the precision's noise explain."""
        # Of few prompts, one that its own bound lets pass may lose more than that, and is luck.
        one = 1.0 - float(np.mean(self._of_prompts(stage)))
        return self._explained(stage, max(_TIES, one / max(1, self.prompts)))

    def _explained(self, stage: int, unseen: float) -> float:
        """The mean IoU that what near-ties and noise cost the eager model, and some that were not seen, leave."""
        ratio = 1.0 if self.gate.flip_noise_ratio is None else self.gate.flip_noise_ratio.limit
        noise = ratio * (1.0 - float(np.mean(self.noise.iou[stage]))) if self.noise.iou else 0.0
        ties = _TIE_RATIO * (1.0 - float(np.mean(self.noise.tie_iou[stage]))) if self.noise.tie_iou else 0.0
        return max(0.0, 1.0 - max(noise, ties) - unseen)

    def _worst_prompt(self, stage: int) -> tuple[float, float]:
        """IoU and bound of the prompt that is furthest below its bound, or nearest to it."""
        return min(
            zip(self.stages[stage].iou, self._of_prompts(stage), strict=True), key=lambda pair: pair[0] - pair[1]
        )

    def _of_prompts(self, stage: int) -> list[float]:
        """The least IoU of each prompt, of a choice made step by step.

        It is half way from chance to the lowest IoU that noise shows on any prompt. A mean hides one wrong prompt; and
        as a lost near-tie costs little or nearly all, which prompt pays is luck, and not a gate of its own.
        """
        noise = (seen for seen in (self.noise.iou, self.noise.tie_iou) if seen)
        lowest = min((min(seen[stage]) for seen in noise), default=1.0)
        return [(lowest + chance) / 2 for chance in self.stages[stage].chance]

    def result(self) -> Selection:
        """The figures and their checks."""
        noise = self.noise.scores or (0.0,) * len(self.schedule)
        return Selection(
            artefact=self.artefact,
            reference=self.reference,
            prompts=self.prompts,
            stages=tuple(
                Kept(
                    layer=entry.layer,
                    selector=entry.selector,
                    iou_mean=float(np.mean(stage.iou)),
                    iou_min=min(stage.iou),
                    iou_bound=float(np.mean(stage.bound)) if stage.bound else self._least(index),
                    margin_min=min(stage.margin) if stage.margin else None,
                    margin_median=float(np.median(stage.margin)) if stage.margin else None,
                    score_noise=noise[index] if stage.margin else None,
                    flipped=stage.flipped,
                )
                for index, (entry, stage) in enumerate(zip(self.schedule, self.stages, strict=True))
                if stage.iou
            ),
            checks=tuple(self._checks()),
        )

    def _checks(self) -> list[Check]:
        who = f"{self.artefact} against {self.reference}"
        checks: list[Check] = []
        for index, (entry, stage) in enumerate(zip(self.schedule, self.stages, strict=True)):
            if not stage.iou:
                continue
            where = f"{who}, {'layer ' + str(entry.layer) if entry.layer >= 0 else 'before the decoder'}"
            if not self._graded(index):
                lowest, limit = self._worst_prompt(index)
                mean, of_prompt = Bound(limit=self._least(index)), Bound(limit=limit)
                judged = not self._hangs(index)
                checks += [
                    bounded(where, "kept-set IoU", float(np.mean(stage.iou)), at_least=mean if judged else None),
                    bounded(where, "kept-set IoU of a prompt", lowest, at_least=of_prompt if judged else None),
                    bounded(where, "kept sets that are no choice", stage.malformed, at_most=Bound(limit=0)),
                ]
                continue
            worst = int(np.argmin(np.subtract(stage.iou, stage.bound)))
            iou = Bound(limit=stage.bound[worst])
            band = Bound(limit=self.band(index), healthy=self.gate.flip_distance.healthy)
            checks += [
                bounded(where, "kept-set IoU", stage.iou[worst], at_least=iou),
                bounded(where, "furthest flip", stage.furthest, at_most=band),
            ]
            if stage.score_error is not None and self.noise.scores:
                times = stage.score_error / max(self.noise.scores[index], 1e-30)
                checks.append(bounded(where, "scores, times the noise", times, at_most=self.gate.noise_ratio))
            elif stage.score_error is not None:
                checks.append(bounded(where, "score error", stage.score_error, at_most=self.gate.relative_error))
        return checks


@dataclass(frozen=True)
class _Cutoff:
    """The contests for places on one prompt: of all free tokens, and of each image's guaranteed few."""

    contests: list[tuple[np.ndarray, np.ndarray]]
    """Scores of tokens kept and of tokens dropped that compete for the same places."""
    num_kept: int

    @classmethod
    def of(
        cls, entering: np.ndarray, kept: np.ndarray, scores: np.ndarray, is_visual: np.ndarray, min_keep: int
    ) -> "_Cutoff":
        visual = is_visual[entering]
        chosen = visual & np.isin(entering, kept)
        image = np.cumsum(~is_visual)[entering]
        guaranteed = np.zeros_like(chosen)
        contests: list[tuple[np.ndarray, np.ndarray]] = []
        for one in np.unique(image[visual]):
            rows = np.flatnonzero(visual & (image == one))
            best = rows[np.argsort(-scores[rows], kind="stable")[:min_keep]]
            guaranteed[best] = True
            contests.append((scores[best], scores[rows[~chosen[rows]]]))
        contests.append((scores[chosen & ~guaranteed], scores[visual & ~chosen]))
        return cls(contests, int(chosen.sum()))

    @property
    def margin(self) -> float:
        """Lead of the worst free token kept over the best one dropped, relative; infinite where nothing is dropped."""
        free, dropped = self.contests[-1]
        worst = free.min(initial=inf)
        return float((worst - dropped.max()) / worst) if len(free) and len(dropped) else inf

    def iou_bound(self, band: float) -> float:
        """The least IoU when tokens may change places whose scores differ by no more than the band."""
        swaps = 0
        for kept, dropped in self.contests:
            if len(kept) and len(dropped):
                falling = int((kept * (1 - band) <= dropped.max()).sum())
                rising = int((dropped >= kept.min() * (1 - band)).sum())
                swaps += min(falling, rising)
        swaps = min(swaps, self.num_kept)
        return (self.num_kept - swaps) / (self.num_kept + swaps) if self.num_kept else 1.0


def _lead(own: np.ndarray, wanted: np.ndarray, entering: np.ndarray, scores: np.ndarray) -> float:
    """The largest relative difference of scores between a token wrongly dropped and the one kept in its place."""
    dropped, added = np.setdiff1d(wanted, own), np.setdiff1d(own, wanted)
    if len(dropped) != len(added) or not len(dropped) or not np.isin(added, entering).all():
        return inf
    best, worst = (-np.sort(-scores[np.searchsorted(entering, rows)]) for rows in (dropped, added))
    if not np.isfinite(best).all() or not np.isfinite(worst).all():
        return inf
    return float((np.abs(best - worst) / np.maximum(best, worst)).max())


def comparable_kept(trace: Trace, fp32: Trace) -> list[np.ndarray]:
    """The kept sets of the stages that the same tokens entered: up to the first that differs, and that one."""
    for index, (own, wanted) in enumerate(zip(trace.kept, fp32.kept, strict=True)):
        if not np.array_equal(own, wanted):
            return trace.kept[: index + 1]
    return trace.kept
