"""Measures the export error: distances of logits and hidden states from a reference that kept the same tokens.

S = steps, V = vocabulary, L = decoder layers, R = sampled prompt positions, D = hidden size, N = visual tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite, sqrt
from operator import attrgetter

import numpy as np

from capa_export.config.gates import Bound, Gate
from capa_export.parity.distance import Distance
from capa_export.parity.records import Noise
from capa_export.parity.trace import Trace
from capa_export.report.schema import Check, ExportError, LayerError

__all__ = ["ExportErrorMeter", "bounded"]

_LAST_BITS = 1e-5
"""Lead of a logit, relative to the largest, that sums in another order may turn round in FP32."""


@dataclass
class ExportErrorMeter:
    """Collects an artefact's worst figures against one reference, over all prompts and steps."""

    artefact: str
    reference: str
    gate: Gate
    noise: Noise = field(default_factory=Noise)
    """Noise of the precision alone."""
    prompts: int = 0
    steps: int = 0
    distance: Distance = field(default_factory=Distance)
    top1_counted: int = 0
    """Steps at which the noise leaves a token that cannot be the likeliest."""
    top1_wrong: int = 0
    same_tokens: int = 0
    """Number of prompts with the reference's token at every step, or one that only the last bits tell from it."""
    log_ratios: list[float] = field(default_factory=list)
    """Per step, the logarithm of the logits' difference in units of the precision's own."""

    def add(self, trace: Trace, reference: Trace, states: Trace | None = None, noise: np.ndarray | None = None) -> None:
        """Count one prompt.

        Args:
            trace: the artefact's trace.
            reference: the reference's trace, with the same kept sets.
            states: the artefact's trace with hidden states, where that is another run.
            noise: [S, V] FP32, change of these logits by the precision alone.
        """
        if noise is not None:
            own = np.linalg.norm((trace.logits - reference.logits).astype(np.float64), axis=-1)
            with np.errstate(divide="ignore", invalid="ignore"):
                self.log_ratios += np.log(own / np.linalg.norm(noise.astype(np.float64), axis=-1)).tolist()
        self.prompts += 1
        same = True
        for own, wanted in zip(trace.logits.astype(np.float64), reference.logits.astype(np.float64), strict=True):
            same &= self._add_logits(own, wanted)
        self.same_tokens += same
        if states is not None:
            self.distance.add_states(states, reference, self._within())

    def _add_logits(self, own_V: np.ndarray, wanted_V: np.ndarray) -> bool:
        """Count one step; whether the likeliest token is the reference's, but for the last bits."""
        self.steps += 1
        self.distance.add_logits(own_V, wanted_V)
        behind_V = wanted_V.max() - wanted_V
        last_bits = _LAST_BITS * float(np.abs(wanted_V).max())
        own = float(behind_V[own_V.argmax()])
        clear = max(2 * self.noise.logits, last_bits)
        if behind_V.max() > clear:
            self.top1_counted += 1
            self.top1_wrong += not own <= clear
        return own <= last_bits

    def _within(self) -> list[float]:
        """[L] How long a difference of a token's state is excused, however short the state itself.

        Where large addends cancel, a state is short, and its direction is chance of the precision: what the eager model
        shows of that one token is a single draw, what it shows of all tokens of the layer is not.
        """
        ratio = self.gate.own_noise_ratio
        if ratio is None:
            return []
        # Noise without a number excuses nothing.
        return [ratio.limit * typical if isfinite(typical) else 0.0 for typical in self.noise.hidden_difference]

    @property
    def times_the_noise(self) -> float:
        """The difference of the logits in units of the noise."""
        return self.distance.difference / self.noise.logits

    @property
    def hidden_times_the_noise(self) -> float:
        """The largest error of a layer's hidden states in units of its noise."""
        noise = np.array(self.noise.hidden)
        # Noise without a number excuses nothing.
        noise = np.where(np.isfinite(noise), np.maximum(noise, 1e-30), 1e-30)
        return float((self.distance.layer_errors / noise).max(initial=0.0))

    def result(self) -> ExportError:
        """The figures and their checks."""
        return ExportError(
            artefact=self.artefact,
            reference=self.reference,
            prompts=self.prompts,
            steps=self.steps,
            noise=self.noise.logits,
            checks=tuple(self._checks()),
            layers=tuple(
                LayerError(
                    layer=layer,
                    relative_error=float(error),
                    cosine=tokens.cosine,
                    norm_ratio=tokens.norm_ratio,
                    noise=self.noise.hidden[layer] if self.noise.hidden else 0.0,
                )
                for layer, (tokens, error) in enumerate(
                    zip(self.distance.layers, self.distance.layer_errors, strict=True)
                )
            ),
        )

    def _checks(self) -> list[Check]:
        gate, who = self.gate, f"{self.artefact} against {self.reference}"
        if not self.prompts:
            return [Check(name="prompts", value=0, at_least=1, failure=f"{who}: compared on no prompt at all")]
        seen, noise = self.distance, self.noise
        checks = [
            self._absolute("relative error", gate.relative_error, (seen.relative_error, noise.relative_error)),
            self._absolute("cosine", gate.cosine, (seen.logits.cosine, noise.cosine)),
            self._absolute("norm ratio", gate.norm_ratio, (seen.logits.norm_ratio, noise.norm_ratio)),
            self._absolute("KL", gate.kl, (seen.kl, noise.kl)),
        ]
        measured = self._measured
        if measured and isfinite(self.noise.logits):
            checks.append(bounded(who, "times the noise", self.times_the_noise, at_most=gate.noise_ratio))
            if self.log_ratios and self.noise.logits:
                typical = float(np.exp(np.mean(self.log_ratios)))
                typical_bound = gate.typical_noise_ratio
                checks.append(bounded(who, "times the noise, typical", typical, at_most=typical_bound))
            # KL grows with the square of what is added to the logits.
            times = sqrt(seen.kl / noise.kl) if noise.kl else 0.0
            checks.append(bounded(who, "root of KL, times the noise", times, at_most=gate.noise_ratio))
        elif measured:
            failure = f"{who}: the eager model itself overflows in this precision; --fp32-layers keeps parts in FP32"
            checks.append(Check(name="times the noise", value=None, failure=failure))
        if seen.features is not None:
            checks += [
                self._absolute("features cosine", gate.hidden_cosine, (seen.features.cosine, noise.features_cosine)),
                self._absolute(
                    "features norm ratio",
                    gate.hidden_norm_ratio,
                    (seen.features.norm_ratio, noise.features_norm_ratio),
                ),
            ]
            if noise.features:
                times = seen.features_error / noise.features
                checks.append(bounded(who, "features, times the noise", times, at_most=gate.noise_ratio))
        if seen.layers:
            checks += [
                self._of_layers("cosine", gate.hidden_cosine, noise.hidden_cosine or [1.0] * len(seen.layers)),
                self._of_layers(
                    "norm ratio", gate.hidden_norm_ratio, noise.hidden_norm_ratio or [0.0] * len(seen.layers)
                ),
            ]
            if noise.hidden:
                times = self.hidden_times_the_noise
                checks.append(bounded(who, "hidden times the noise", times, at_most=gate.noise_ratio))
        return [*checks, self._top1(who), self._same_tokens(who)]

    @property
    def _measured(self) -> bool:
        """Whether the precision has noise."""
        return self.noise.logits > 0 or not isfinite(self.noise.logits)

    def _of_layers(self, name: str, bound: Bound, noise: Sequence[float]) -> Check:
        """A check of all hidden states; where it fails, of those that differ by more than the precision explains."""
        figure = attrgetter(name.replace(" ", "_"))
        every, beyond = (
            self._absolute(f"hidden {name}", bound, *zip(map(figure, layers), noise, strict=True))
            for layers in (self.distance.layers, self.distance.beyond)
        )
        return beyond if every.failure else every

    def _absolute(self, name: str, bound: Bound | None, *found: tuple[float, float]) -> Check:
        """A check against an absolute bound, or a multiple of the eager model's own figure where that is wider.

        Args:
            name: of the figure.
            bound: the absolute one, if there is one.
            found: figures, each with the eager model's own in this precision; that furthest beyond its limit counts.
        """
        who, ratio = f"{self.artefact} against {self.reference}", self.gate.own_noise_ratio
        is_cosine = name.endswith("cosine")

        def error(figure: float) -> float:
            return 1 - figure if is_cosine else figure

        def limit(own: float) -> float:
            assert bound is not None
            # Noise without a number excuses nothing.
            if ratio is None or not isfinite(own):
                return bound.limit
            excused = ratio.limit ** (2 if is_cosine or name == "KL" else 1) * error(own)
            return error(excused) if excused > error(bound.limit) else bound.limit

        if bound is None:
            return bounded(who, name, max((value for value, _ in found), key=error))
        limits = [limit(own) for _, own in found]
        at = max(range(len(found)), key=lambda index: error(found[index][0]) - error(limits[index]))
        (value, own), wide = found[at], bound.model_copy(update={"limit": limits[at]})
        noise = own if self._measured else None
        if is_cosine:
            return bounded(who, name, value, at_least=wide, noise=noise)
        return bounded(who, name, value, at_most=wide, noise=noise)

    def _top1(self, who: str) -> Check:
        failure = ""
        if self.top1_wrong:
            failure = f"{who}: top-1 differs at {self.top1_wrong} of {self.top1_counted} steps with a clear margin"
        elif not self.top1_counted and isfinite(self.noise.logits):
            failure = f"{who}: no logit is behind another by twice the precision noise of {self.noise.logits:.2e}"
        return Check(name="top-1 wrong", value=self.top1_wrong, at_most=0, of=self.top1_counted, failure=failure)

    def _same_tokens(self, who: str) -> Check:
        failure = ""
        if self.gate.same_tokens and self.same_tokens < self.prompts:
            failure = f"{who}: greedy tokens differ on {self.prompts - self.same_tokens} of {self.prompts} prompts"
        at_least = self.prompts if self.gate.same_tokens else None
        return Check(name="same tokens", value=self.same_tokens, at_least=at_least, of=self.prompts, failure=failure)


def bounded(
    who: str,
    name: str,
    value: float,
    *,
    at_most: Bound | None = None,
    at_least: Bound | None = None,
    noise: float | None = None,
) -> Check:
    """A check of a figure against at most one bound, which NaN does not meet."""
    bound = at_most or at_least
    failure = ""
    if at_most is not None and not value <= at_most.limit:
        failure = f"{who}: {name} {value:.3g}, above {at_most.limit:.3g}"
    elif at_least is not None and not value >= at_least.limit:
        failure = f"{who}: {name} {value:.6g}, below {at_least.limit:.6g}"
    return Check(
        name=name,
        value=value,
        at_most=None if at_most is None else at_most.limit,
        at_least=None if at_least is None else at_least.limit,
        healthy=None if bound is None else bound.healthy,
        noise=noise,
        failure=failure,
    )
