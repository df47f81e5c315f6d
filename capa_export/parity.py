"""How far one run is from another: metrics of logits and kept sets, and the gates on them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from capa_export.recipe import Gate

__all__ = ["Comparison", "Trace", "restored"]


_FIGURES = {
    "difference": float("inf"),
    "relative_error": float("inf"),
    "cosine": -float("inf"),
    "norm_ratio": float("inf"),
    "flip_distance": float("inf"),
    "precision_noise": float("inf"),
}
"""What may come out as NaN or infinity, with its worst value."""


@dataclass(frozen=True)
class Trace:
    """One prompt, prefilled and then fed the same tokens whoever runs it. S = steps, V = vocabulary."""

    logits: np.ndarray
    """[S, V] FP32."""
    kept: list[np.ndarray]
    """Kept prompt positions after each stage."""
    scores: list[np.ndarray] = field(default_factory=list)
    """Score of each token that entered a stage; of a reference only."""

    @property
    def tokens(self) -> list[int]:
        """The likeliest token of each step."""
        return self.logits.argmax(-1).tolist()


@dataclass
class Comparison:
    """Worst figures of an artefact against its reference, over all prompts and steps."""

    name: str
    reference: str
    noise: float = 0.0
    """Largest logit difference that the precision alone makes; top-1 counts where the margin exceeds twice that."""
    prompts: int = 0
    steps: int = 0
    difference: float = 0.0
    """Largest absolute difference of a logit."""
    relative_error: float = 0.0
    cosine: float = 1.0
    norm_ratio: float = 0.0
    top1_counted: int = 0
    top1_wrong: int = 0
    same_tokens: int = 0
    """Prompts with the reference's token at every step."""
    kept_iou: list[float] = field(default_factory=list)
    flip_distance: float = 0.0
    """By how much, at worst, a token wrongly dropped outscores one wrongly kept: 0.01 is a flip at the cut."""
    replayed: int = 0
    """Prompts whose kept set flipped, so that their logits are held against the reference with the same set."""

    def add(self, trace: Trace, reference: Trace, num_text: int, *, flipped: Trace | None = None) -> None:
        """Count one prompt.

        Args:
            trace: of the artefact.
            reference: of the reference, with the artefact's kept set if that flipped.
            num_text: text tokens of the prompt, which are in every kept set and do not count.
            flipped: the reference with its own kept sets, where the artefact chose others.
        """
        self.prompts += 1
        self.replayed += flipped is not None
        expected = reference.kept if flipped is None else flipped.kept
        if flipped is not None:
            self.flip_distance = max(self.flip_distance, _flip_distance(trace.kept, flipped))
        self.kept_iou += [_iou(a, b, num_text) for a, b in zip(trace.kept, expected, strict=True)]
        for logits, wanted in zip(trace.logits.astype(np.float64), reference.logits.astype(np.float64), strict=True):
            self.steps += 1
            norm, wanted_norm = np.linalg.norm(logits), np.linalg.norm(wanted)
            # A NaN must fail every gate, and max() would drop it.
            finite = bool(np.isfinite(logits).all())
            self.difference = _worse(self.difference, np.abs(logits - wanted).max(), finite=finite)
            self.relative_error = _worse(
                self.relative_error, np.abs(logits - wanted).max() / np.abs(wanted).max(), finite=finite
            )
            self.norm_ratio = _worse(self.norm_ratio, abs(norm / wanted_norm - 1), finite=finite)
            self.cosine = -_worse(-self.cosine, -float(logits @ wanted) / (norm * wanted_norm), finite=finite)
            second, first = np.partition(wanted, -2)[-2:]
            if first - second > 2 * self.noise:
                self.top1_counted += 1
                self.top1_wrong += int(logits.argmax() != wanted.argmax())
        self.same_tokens += trace.tokens == reference.tokens

    def failures(self, gate: Gate) -> list[str]:
        """One sentence per bound that is not met."""
        problems: list[str] = []
        if gate.relative_error is not None and not self.relative_error <= gate.relative_error:
            problems.append(f"relative error {self.relative_error:.2e} above {gate.relative_error:g}")
        measured = self.noise > 0 and np.isfinite(self.noise)
        if measured and gate.noise_ratio is not None and not self.difference <= gate.noise_ratio * self.noise:
            times = self.difference / self.noise
            problems.append(f"logits off by {times:.1f} times the noise of the precision, above {gate.noise_ratio:g}")
        if not self.cosine >= gate.cosine:
            problems.append(f"cosine {self.cosine:.6f} below {gate.cosine:g}")
        if not self.norm_ratio <= gate.norm_ratio:
            problems.append(f"norm ratio off by {self.norm_ratio:.2e}, above {gate.norm_ratio:g}")
        if not self.prompts:
            problems.append("compared on no prompt at all")
        if not np.isfinite(self.noise):
            problems.append("the eager model itself overflows in this precision")
        elif not self.top1_counted:
            problems.append(f"no step has a margin above twice the precision noise of {self.noise:.2e}")
        if not self.flip_distance <= gate.flip_distance:
            problems.append(
                f"a dropped token outscores a kept one by {self.flip_distance:.1%}, above {gate.flip_distance:g}"
            )
        if self.kept_iou and not self.mean_iou >= gate.kept_iou:
            problems.append(f"kept-set IoU {self.mean_iou:.4f} below {gate.kept_iou:g}")
        if gate.same_tokens and self.same_tokens < self.prompts:
            problems.append(f"greedy tokens differ on {self.prompts - self.same_tokens} of {self.prompts} prompts")
        if self.top1_wrong:
            problems.append(f"top-1 differs at {self.top1_wrong} of {self.top1_counted} steps with a clear margin")
        return [f"{self.name} against {self.reference}: {problem}" for problem in problems]

    @property
    def mean_iou(self) -> float:
        return float(np.mean(self.kept_iou)) if self.kept_iou else 1.0

    def as_dict(self, gate: Gate) -> dict[str, Any]:
        """For `parity.json`, which has null where a figure is not finite."""
        figures: dict[str, Any] = {
            "artefact": self.name,
            "reference": self.reference,
            "prompts": self.prompts,
            "steps": self.steps,
            "difference": self.difference,
            "relative_error": self.relative_error,
            "cosine": self.cosine,
            "norm_ratio": self.norm_ratio,
            "kept_iou_mean": self.mean_iou,
            "kept_iou_min": min(self.kept_iou, default=1.0),
            "prompts_with_flips": self.replayed,
            "flip_distance": self.flip_distance,
            "same_tokens": self.same_tokens,
            "top1_counted": self.top1_counted,
            "top1_wrong": self.top1_wrong,
            "precision_noise": self.noise,
            "gate": gate.model_dump(exclude_none=True),
            "failures": self.failures(gate),
        }
        return {name: None if name in _FIGURES and not np.isfinite(value) else value for name, value in figures.items()}


def restored(row: Mapping[str, Any]) -> dict[str, Any]:
    """A comparison as read from `parity.json`, with the worst there is in place of null."""
    return {name: _FIGURES[name] if value is None and name in _FIGURES else value for name, value in row.items()}


def _worse(worst: float, value: float, *, finite: bool) -> float:
    return max(worst, float(value)) if finite and np.isfinite(value) else float("inf")


def _flip_distance(kept: Sequence[np.ndarray], reference: Trace) -> float:
    """By how much the best token wrongly dropped outscores the worst one wrongly kept, relative to the former.

    At the first stage that differs: later ones choose from different tokens and say nothing.
    """
    entering = np.arange(len(reference.scores[0]))
    for own, wanted, scores in zip(kept, reference.kept, reference.scores, strict=True):
        if not np.array_equal(own, wanted):
            dropped, added = np.setdiff1d(wanted, own), np.setdiff1d(own, wanted)
            if len(dropped) != len(added) or not np.isin(added, entering).all():
                return float("inf")
            best, worst = (scores[np.searchsorted(entering, rows)] for rows in (dropped, added))
            return float((best.max() - worst.min()) / best.max())
        entering = wanted
    return 0.0


def _iou(a: np.ndarray, b: np.ndarray, num_text: int) -> float:
    """Intersection over union of two kept sets, text left out."""
    common = len(np.intersect1d(a, b)) - num_text
    union = len(np.union1d(a, b)) - num_text
    return common / union if union else 1.0
