"""Distances of one run's logits and states from another's: of an artefact from its reference, of a precision from FP32.

S = steps, V = vocabulary, L = decoder layers, R = sampled prompt positions, D = hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf, isfinite
from statistics import NormalDist

import numpy as np

from capa_export.base.statistics import kl_divergence, spread
from capa_export.parity.trace import Trace

__all__ = ["Distance", "VectorDistance", "worse"]


@dataclass
class VectorDistance:
    """Worst cosine, norm ratio and length of the difference over pairs of vectors."""

    cosine: float = 1.0
    norm_ratio: float = 0.0
    """Largest | |own| / |reference| - 1 |."""
    length: float = 0.0
    """Largest |own - reference| / |reference|: how far the norms would be apart if the difference lay along one."""

    def add(self, own_XD: np.ndarray, reference_XD: np.ndarray) -> None:
        """Count pairs of rows."""
        if not len(reference_XD):
            # The last token is never dropped: a reference without it has overflowed.
            self.cosine, self.norm_ratio, self.length = -inf, inf, inf
            return
        norm, wanted = np.linalg.norm(own_XD, axis=-1), np.linalg.norm(reference_XD, axis=-1)
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            cosine = (own_XD * reference_XD).sum(-1) / (norm * wanted)
            ratio = np.abs(norm / wanted - 1)
            length = np.linalg.norm(own_XD - reference_XD, axis=-1) / wanted
        self.cosine = -worse(-self.cosine, float(-cosine.min()))
        self.norm_ratio = worse(self.norm_ratio, float(ratio.max()))
        self.length = worse(self.length, float(length.max()))


@dataclass
class Distance:
    """Collects the worst figures over prompts and steps; infinite where one is not finite."""

    difference: float = 0.0
    """Largest absolute difference of a logit."""
    relative_error: float = 0.0
    """Largest difference of a logit over the largest logit of its step."""
    kl: float = 0.0
    """Largest KL(reference || own) of the next token, in nats."""
    squares: list[float] = field(default_factory=list[float])
    """Of each step, the mean square of the difference of a logit."""
    spread: float = 0.0
    """The largest of any step of the reference, as `base.statistics.spread` has it."""
    logits: VectorDistance = field(default_factory=VectorDistance)
    features: VectorDistance | None = None
    features_error: float = 0.0
    layers: list[VectorDistance] = field(default_factory=list)
    beyond: list[VectorDistance] = field(default_factory=list)
    """The same of those states alone that differ by more than they may, whatever their own length."""
    differences: list[list[float]] = field(default_factory=list)
    """Per layer, how long the difference of each state is."""
    layer_errors: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """[L]"""

    def add_logits(self, own_V: np.ndarray, wanted_V: np.ndarray) -> None:
        """Count one step."""
        difference = float(np.abs(own_V - wanted_V).max())
        self.difference = worse(self.difference, difference)
        self.relative_error = worse(self.relative_error, difference / max(float(np.abs(wanted_V).max()), 1e-30))
        self.kl = worse(self.kl, kl_divergence(wanted_V, own_V))
        self.squares.append(float(np.square(own_V - wanted_V).mean()))
        self.spread = max(self.spread, spread(wanted_V))
        self.logits.add(own_V, wanted_V)

    @property
    def expected_kl(self) -> float:
        """The largest KL in nats to expect of differences as large, wherever they fall, at steps that take them worst.

        Of independent changes with variance v it is v (1 - sum p^2) / 2 on average, to the second order. Where two
        tokens compete, it goes by the square of one normal variable, of which as many steps are as many draws.
        """
        if not self.squares:
            return 0.0
        draws = NormalDist().inv_cdf(1 - 0.5 / len(self.squares)) ** 2
        return max(1.0, draws) * self.spread * float(np.mean(self.squares)) / 2

    def add_states(self, own: Trace, reference: Trace, within: Sequence[float] = ()) -> None:
        """Count the vision tower's output and the hidden states of one prompt, where both traces hold them.

        Args:
            own: the trace to measure.
            reference: the trace to measure from.
            within: [L] how long a state's difference may be without being counted in `beyond`; 0 where empty.
        """
        if own.features is not None and reference.features is not None:
            self.features = self.features or VectorDistance()
            self.features.add(own.features.astype(np.float64), reference.features.astype(np.float64))
            self.features_error = worse(self.features_error, _relative_error(own.features, reference.features))
        if own.hidden is None or reference.hidden is None:
            return
        if not self.layers:
            self.layers, self.beyond = ([VectorDistance() for _ in reference.hidden] for _ in range(2))
            self.differences = [[] for _ in reference.hidden]
        for layer, (own_XD, wanted_XD) in enumerate(zip(own.hidden, reference.hidden, strict=True)):
            seen = ~np.isnan(wanted_XD[:, 0])
            pair = own_XD[seen].astype(np.float64), wanted_XD[seen].astype(np.float64)
            self.layers[layer].add(*pair)
            lengths = np.linalg.norm(pair[0] - pair[1], axis=-1)
            self.differences[layer] += lengths.tolist()
            # A NaN is not within anything.
            far = ~(lengths <= (within[layer] if within else 0.0))
            if far.any() or not seen.any():
                self.beyond[layer].add(*(vectors[far] for vectors in pair))
        errors = _relative_errors(own.hidden, reference.hidden, len(reference.logits))
        errors[~np.isfinite(errors)] = inf
        self.layer_errors = np.maximum(self.layer_errors, errors) if len(self.layer_errors) else errors


def worse(worst: float, value: float) -> float:
    """The larger of two figures; infinity where `value` is not finite, since max() would drop a NaN."""
    return max(worst, value) if isfinite(value) else inf


def _relative_error(own: np.ndarray, reference: np.ndarray) -> float:
    """|| difference || / || reference || of two arrays of one shape."""
    difference = (own - reference).astype(np.float64)
    return float(np.linalg.norm(difference) / max(float(np.linalg.norm(reference.astype(np.float64))), 1e-30))


def _relative_errors(hidden: np.ndarray, reference: np.ndarray, steps: int) -> np.ndarray:
    """[L] || difference || / || reference || of the prompt's states or of the steps', whichever is larger.

    A prompt has many states and an answer few, which would not show in one norm over all.

    Args:
        hidden: [L, R + S - 1, D].
        reference: [L, R + S - 1, D], NaN where there is no state.
        steps: S.
    """
    seen = ~np.isnan(reference[..., :1])
    prompt = reference.shape[1] - (steps - 1)
    difference, wanted = (np.where(seen, one, 0.0).astype(np.float64) for one in (hidden - reference, reference))
    errors = [
        np.linalg.norm(difference[:, part], axis=(1, 2))
        / np.maximum(np.linalg.norm(wanted[:, part], axis=(1, 2)), 1e-30)
        for part in (slice(None, prompt), slice(prompt, None))
    ]
    return np.maximum(*errors)
