"""Traces: one runtime's results on one prompt, in the form in which runtimes are compared.

S = steps, V = vocabulary, L = decoder layers, R = sampled prompt positions, D = hidden size, N = visual tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

__all__ = ["HiddenStates", "Trace", "overlap", "rows_of_positions", "sampled_rows"]

_MOST_ROWS = 64


@dataclass(frozen=True)
class Trace:
    """The results of a prefill and of decode steps on given tokens."""

    logits: np.ndarray
    """[S, V] FP32."""
    kept: list[np.ndarray]
    """Kept prompt positions after each stage."""
    scores: list[np.ndarray] = field(default_factory=list)
    """Per stage, the score of each token that entered it; empty where scores are not seen."""
    hidden: np.ndarray | None = None
    """[L, R + S - 1, D] FP32, output of each layer at the sampled positions, then at each step; NaN where a position
    had been dropped. None where it is not seen."""
    features: np.ndarray | None = None
    """[N, D] FP32, the vision tower's output; None where it is not seen, or there is none."""

    @property
    def tokens(self) -> list[int]:
        """The likeliest token of each step."""
        return self.logits.argmax(-1).tolist()


def sampled_rows(length: int) -> np.ndarray:
    """[R] prompt positions of which hidden states are compared: evenly spaced, the last among them."""
    return np.unique(np.linspace(0, length - 1, min(length, _MOST_ROWS)).round().astype(np.int64))


class HiddenStates:
    """Gathers the hidden states of a trace, a layer or a step at a time."""

    def __init__(self, rows: np.ndarray, num_layers: int) -> None:
        self.rows = rows
        self._prefill: list[np.ndarray] = []
        self._steps: list[list[np.ndarray]] = [[] for _ in range(num_layers)]

    def add_prefill(self, hidden_TD: np.ndarray, positions_T: np.ndarray) -> None:
        """Add the next layer's output, given the prompt positions of its rows, ascending."""
        found = np.isin(self.rows, positions_T)
        sampled = np.full((len(self.rows), hidden_TD.shape[1]), np.nan, np.float32)
        sampled[found] = hidden_TD[np.searchsorted(positions_T, self.rows[found])]
        self._prefill.append(sampled)

    def add_step(self, layer: int, hidden_D: np.ndarray) -> None:
        """Add a layer's output at the next decode step."""
        self._steps[layer].append(hidden_D.astype(np.float32))

    def stacked(self) -> np.ndarray:
        """All hidden states, [L, R + S - 1, D] FP32."""
        layers = zip(self._prefill, self._steps, strict=True)
        return np.stack([np.concatenate([prefill, *(step[None] for step in steps)]) for prefill, steps in layers])


def rows_of_positions(kept: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Kept prompt positions of each stage as row numbers of the tokens that enter it."""
    entering = [None, *kept[:-1]]
    return [own if before is None else np.searchsorted(before, own) for before, own in zip(entering, kept, strict=True)]


def overlap(a: np.ndarray, b: np.ndarray, num_text: int) -> float:
    """Intersection over union of two kept sets, text left out."""
    common = len(np.intersect1d(a, b)) - num_text
    union = len(np.union1d(a, b)) - num_text
    return common / union if union else 1.0
