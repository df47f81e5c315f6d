"""Measures the export error: distances of logits and hidden states from a reference that kept the same tokens.

S = steps, V = vocabulary, L = decoder layers, R = sampled prompt positions, D = hidden size, N = visual tokens.
"""

from dataclasses import dataclass, field
from math import inf, isfinite, sqrt

import numpy as np

from capa_export.base.statistics import kl_divergence
from capa_export.config.gates import Bound, Gate
from capa_export.parity.records import Noise, relative_error, relative_errors
from capa_export.parity.trace import Trace
from capa_export.report.schema import Check, ExportError, LayerError

__all__ = ["ExportErrorMeter", "bounded"]


@dataclass
class _Tokens:
    """Worst cosine and norm ratio over pairs of vectors."""

    cosine: float = 1.0
    norm_ratio: float = 0.0

    def add(self, own_XD: np.ndarray, reference_XD: np.ndarray) -> None:
        if not len(reference_XD):
            # The last token is never dropped: a reference without it has overflowed.
            self.cosine, self.norm_ratio = -inf, inf
            return
        norm, wanted = np.linalg.norm(own_XD, axis=-1), np.linalg.norm(reference_XD, axis=-1)
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            cosine = (own_XD * reference_XD).sum(-1) / (norm * wanted)
            ratio = np.abs(norm / wanted - 1)
        self.cosine = -worse(-self.cosine, float(-cosine.min()))
        self.norm_ratio = worse(self.norm_ratio, float(ratio.max()))


@dataclass
class ExportErrorMeter:
    """Collects an artefact's worst figures against one reference, over all prompts and steps."""

    artefact: str
    reference: str
    gate: Gate
    noise: Noise = field(default_factory=Noise)
    """Noise of the precision alone; top-1 counts where the reference's margin exceeds twice that of the logits."""
    prompts: int = 0
    steps: int = 0
    difference: float = 0.0
    """Largest absolute difference of a logit."""
    relative_error: float = 0.0
    kl: float = 0.0
    logits: _Tokens = field(default_factory=_Tokens)
    top1_counted: int = 0
    top1_wrong: int = 0
    same_tokens: int = 0
    """Number of prompts with the reference's token at every step."""
    log_ratios: list[float] = field(default_factory=list)
    """Per step, the logarithm of the logits' difference in units of the precision's own."""
    features: _Tokens | None = None
    features_error: float = 0.0
    layers: list[_Tokens] = field(default_factory=list)
    layer_errors: np.ndarray = field(default_factory=lambda: np.zeros(0))

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
        for own, wanted in zip(trace.logits.astype(np.float64), reference.logits.astype(np.float64), strict=True):
            self._add_logits(own, wanted)
        self.same_tokens += trace.tokens == reference.tokens
        if states is None:
            return
        if states.features is not None and reference.features is not None:
            self.features = self.features or _Tokens()
            self.features.add(states.features.astype(np.float64), reference.features.astype(np.float64))
            self.features_error = worse(self.features_error, relative_error(states.features, reference.features))
        if states.hidden is not None and reference.hidden is not None:
            self._add_hidden(states.hidden, reference.hidden, len(reference.logits))

    def _add_logits(self, own_V: np.ndarray, wanted_V: np.ndarray) -> None:
        self.steps += 1
        difference = float(np.abs(own_V - wanted_V).max())
        self.difference = worse(self.difference, difference)
        self.relative_error = worse(self.relative_error, difference / float(np.abs(wanted_V).max()))
        self.kl = worse(self.kl, kl_divergence(wanted_V, own_V))
        self.logits.add(own_V, wanted_V)
        second, first = np.partition(wanted_V, -2)[-2:]
        if first - second > 2 * self.noise.logits:
            self.top1_counted += 1
            self.top1_wrong += int(own_V.argmax() != wanted_V.argmax())

    def _add_hidden(self, own_LXD: np.ndarray, wanted_LXD: np.ndarray, steps: int) -> None:
        self.layers = self.layers or [_Tokens() for _ in wanted_LXD]
        for tokens, own, wanted in zip(self.layers, own_LXD, wanted_LXD, strict=True):
            seen = ~np.isnan(wanted[:, 0])
            tokens.add(own[seen].astype(np.float64), wanted[seen].astype(np.float64))
        errors = relative_errors(own_LXD, wanted_LXD, steps)
        errors[~np.isfinite(errors)] = inf
        self.layer_errors = np.maximum(self.layer_errors, errors) if len(self.layer_errors) else errors

    @property
    def times_the_noise(self) -> float:
        """The difference of the logits in units of the noise."""
        return self.difference / self.noise.logits

    @property
    def hidden_times_the_noise(self) -> float:
        """The largest error of a layer's hidden states in units of its noise."""
        return float((self.layer_errors / np.maximum(self.noise.hidden, 1e-30)).max(initial=0.0))

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
                for layer, (tokens, error) in enumerate(zip(self.layers, self.layer_errors, strict=True))
            ),
        )

    def _checks(self) -> list[Check]:
        gate, who = self.gate, f"{self.artefact} against {self.reference}"
        if not self.prompts:
            return [Check(name="prompts", value=0, at_least=1, failure=f"{who}: compared on no prompt at all")]
        checks = [
            bounded(who, "relative error", self.relative_error, at_most=gate.relative_error),
            bounded(who, "cosine", self.logits.cosine, at_least=gate.cosine),
            bounded(who, "norm ratio", self.logits.norm_ratio, at_most=gate.norm_ratio),
            bounded(who, "KL", self.kl, at_most=gate.kl),
        ]
        measured = self.noise.logits > 0 or not isfinite(self.noise.logits)
        if measured and isfinite(self.noise.logits):
            checks.append(bounded(who, "times the noise", self.times_the_noise, at_most=gate.noise_ratio))
            if self.log_ratios and self.noise.logits:
                typical = float(np.exp(np.mean(self.log_ratios)))
                typical_bound = gate.typical_noise_ratio
                checks.append(bounded(who, "times the noise, typical", typical, at_most=typical_bound))
            # KL grows with the square of what is added to the logits.
            times = sqrt(self.kl / self.noise.kl) if self.noise.kl else 0.0
            checks.append(bounded(who, "root of KL, times the noise", times, at_most=gate.noise_ratio))
        elif measured:
            failure = f"{who}: the eager model itself overflows in this precision; --fp32-layers keeps parts in FP32"
            checks.append(Check(name="times the noise", value=None, failure=failure))
        if self.features is not None:
            checks += [
                bounded(who, "features cosine", self.features.cosine, at_least=gate.hidden_cosine),
                bounded(who, "features norm ratio", self.features.norm_ratio, at_most=gate.hidden_norm_ratio),
            ]
            if self.noise.features:
                times = self.features_error / self.noise.features
                checks.append(bounded(who, "features, times the noise", times, at_most=gate.noise_ratio))
        if self.layers:
            cosine = min(tokens.cosine for tokens in self.layers)
            norm_ratio = max(tokens.norm_ratio for tokens in self.layers)
            checks += [
                bounded(who, "hidden cosine", cosine, at_least=gate.hidden_cosine),
                bounded(who, "hidden norm ratio", norm_ratio, at_most=gate.hidden_norm_ratio),
            ]
            if self.noise.hidden:
                times = self.hidden_times_the_noise
                checks.append(bounded(who, "hidden times the noise", times, at_most=gate.noise_ratio))
        return [*checks, self._top1(who), self._same_tokens(who)]

    def _top1(self, who: str) -> Check:
        failure = ""
        if self.top1_wrong:
            failure = f"{who}: top-1 differs at {self.top1_wrong} of {self.top1_counted} steps with a clear margin"
        elif not self.top1_counted and isfinite(self.noise.logits):
            failure = f"{who}: no step has a margin above twice the precision noise of {self.noise.logits:.2e}"
        return Check(name="top-1 wrong", value=self.top1_wrong, at_most=0, of=self.top1_counted, failure=failure)

    def _same_tokens(self, who: str) -> Check:
        failure = ""
        if self.gate.same_tokens and self.same_tokens < self.prompts:
            failure = f"{who}: greedy tokens differ on {self.prompts - self.same_tokens} of {self.prompts} prompts"
        at_least = self.prompts if self.gate.same_tokens else None
        return Check(name="same tokens", value=self.same_tokens, at_least=at_least, of=self.prompts, failure=failure)


def bounded(who: str, name: str, value: float, *, at_most: Bound | None = None, at_least: Bound | None = None) -> Check:
    """A check of a figure against at most one bound, which NaN does not meet."""
    bound = at_most or at_least
    failure = ""
    if at_most is not None and not value <= at_most.limit:
        failure = f"{who}: {name} {value:.3g}, above {at_most.limit:g}"
    elif at_least is not None and not value >= at_least.limit:
        failure = f"{who}: {name} {value:.6g}, below {at_least.limit:g}"
    return Check(
        name=name,
        value=value,
        at_most=None if at_most is None else at_most.limit,
        at_least=None if at_least is None else at_least.limit,
        healthy=None if bound is None else bound.healthy,
        failure=failure,
    )


def worse(worst: float, value: float) -> float:
    """The larger of two figures; infinity where `value` is not finite, since max() would drop a NaN."""
    return max(worst, value) if isfinite(value) else inf
