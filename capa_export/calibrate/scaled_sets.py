"""The sets of layers whose visual FFNs were tried as scales, and which of them a build takes. Needs no torch."""

from pathlib import Path
from typing import Literal

from capa_export.base.errors import CapaError
from capa_export.base.statistics import Entry, Figure
from capa_export.config.recipe import FFN, ranges

__all__ = ["EFFECT", "FfnEffect", "ScaledSet"]

EFFECT = "ffn_effect.json"


class ScaledSet(Entry):
    """A set of layers in which a scale stood for the FFN of visual tokens."""

    layers: tuple[int, ...]
    """Ascending."""
    kl: Figure
    """Mean KL(all FFNs || this) of the next token along dense's answers, tokens dropped alike, in nats."""
    agreement: float
    """Share of these next tokens that are dense's."""

    def within(self, budget: float) -> bool:
        """Whether the KL is a number of nats no larger than this."""
        return self.kl is not None and self.kl <= budget


class FfnEffect(Entry):
    """What was tried, and the largest set within the budget."""

    version: Literal[1] = 1
    calibration: str
    """Digest of the calibration whose scales were tried."""
    eta: float
    """Cosine that a layer had to exceed to be tried."""
    budget: float
    """Largest mean KL, in nats."""
    schedule: str
    """What dropped tokens meanwhile."""
    samples: int
    """Prompts asked, none of which the calibration has seen where there were enough."""
    tried: tuple[ScaledSet, ...]
    """In that order, the set of all linear layers first."""

    @property
    def chosen(self) -> ScaledSet:
        """The largest set within the budget."""
        within = [one for one in self.tried if one.within(self.budget)]
        return max(within, key=lambda one: len(one.layers), default=ScaledSet(layers=(), kl=0.0, agreement=1.0))

    def answers(self, calibration: str, ffn: FFN) -> bool:
        """Whether it was measured with this calibration, threshold and budget."""
        return (self.calibration, self.eta, self.budget) == (calibration, ffn.eta, ffn.budget)

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "FfnEffect":
        """Read what `save` wrote.

        Raises:
            CapaError: the file is missing or damaged.
        """
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CapaError(f"{path}: says nothing of what scales cost ({error}); calibrate again") from error

    @property
    def words(self) -> str:
        """What was found, in a sentence."""
        if not self.tried:
            return "no layer is linear"
        every, chosen = self.tried[0], self.chosen
        layers = f"layers {ranges(chosen.layers)}" if chosen.layers else "none"
        found = f"a scale in {layers}: KL {_nats(chosen.kl)} with {self.schedule}, budget {self.budget:g}"
        return found if chosen == every else f"{found}; in all {len(every.layers)} it would be {_nats(every.kl)}"


def _nats(kl: float | None) -> str:
    return "not finite" if kl is None else f"{kl:.2g} nats"
