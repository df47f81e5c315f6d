"""Methods that just meet a budget: each with the smallest ratio that does."""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from capa_export.base.errors import CapaError, ExitCode
from capa_export.calibrate.sums import Calibration
from capa_export.config.recipe import FFN, Recipe
from capa_export.config.schedule import Method, Stage, parse_method, stage_text
from capa_export.model.families import Family, require_selection
from capa_export.selectors.selector import Place, SelectorChoice, load_selector
from capa_export.selectors.selector import selectors as all_selectors
from capa_export.study.tune.costs import Costs

__all__ = ["OTHER_MORE", "Candidates", "ffns", "linear_layers", "offered"]

_GRID = 1000
"""Number of ratios that are tried."""
_MORE, OTHER_MORE = 1.5, (1.2, 2.0, 3.0)
"""Factors by which the first of two stages keeps more tokens than it would alone; the others for the best pairs."""
_FIRSTS, _LATER = 3, (4, 3, 2)
"""Number of first stages that get a second one, and the parts of the decoder where that is."""
_ETAS = (0.9, 0.93, 0.95, 0.97, 0.98, 0.99)
_FIRST_LAYER: dict[Place, int] = {"attention": 0, "entry": 1}


def offered(family: Family) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Selectors that a family can do, and those that it cannot."""

    def can(name: str) -> bool:
        if SelectorChoice(name).reads_tower:
            try:
                require_selection(family, name)
            except CapaError:
                return False
        return True

    return tuple(filter(can, all_selectors())), tuple(name for name in all_selectors() if not can(name))


def ffns(ffn: FFN, calibration: Calibration) -> list[float | None]:
    """One eta for every set of linear layers that can be had, the recipe's first; None for all FFNs as they are."""
    by_layers: dict[tuple[int, ...], float | None] = {}
    for eta in (ffn.eta, *_ETAS):
        by_layers.setdefault(calibration.scaled_layers(ffn, eta), eta)
    by_layers.setdefault((), None)
    return list(by_layers.values())


def linear_layers(method: Method, recipe: Recipe, calibration: Calibration) -> tuple[int, ...]:
    """Layers in which a scale stands for the FFN of visual tokens."""
    return calibration.scaled_layers(recipe.ffn, method.eta) if method.ffn == "scale" else ()


@dataclass(frozen=True)
class Candidates:
    """The methods that may be tried within the budget."""

    recipe: Recipe
    selectors: Sequence[str]
    calibration: Calibration
    costs: Costs
    budget: float
    """Fraction of dense's FLOPs."""

    def share(self, method: Method) -> float:
        """A method's share of dense's FLOPs.

        Raises:
            CapaError: a ratio leaves fewer tokens than a selector can choose.
        """
        return self.costs.share(method, linear_layers(method, self.recipe, self.calibration))

    def own(self) -> tuple[Method | None, int]:
        """The recipe's schedule within the budget, and how many layers earlier it had to move for that.

        None where it fits nowhere.
        """
        earliest = [
            stage.layer - _FIRST_LAYER[stage.chosen.place]
            for stage in self.recipe.prune.schedule
            if stage.chosen.place != "input"
        ]
        for earlier in range(min(earliest, default=0) + 1):
            stages = [_moved(stage, earlier) for stage in self.recipe.prune.schedule]
            if (method := self._scaled(stages, self.recipe.ffn.eta)) is not None:
                return method, earlier
        return None, 0

    def one_stage(self) -> list[Method]:
        """Every selector at every layer of the first half, and at those published for the model.

        Raises:
            CapaError: none of them meets the budget.
        """
        stages = list(self._stages())
        found = [self._scaled([stage], self.recipe.ffn.eta) for stage in stages]
        if methods := _drop_duplicates(found):
            return methods
        least = min(self._least(stage) for stage in stages)
        raise CapaError(
            f"--budget: {self.budget:.4g} of dense is less than any schedule costs on these samples, which is "
            f"{least:.4g}; give more",
            ExitCode.USAGE,
        )

    def two_stages(self, ranked: Sequence[Method]) -> list[Method]:
        """First stages as in the best of `ranked`, which keep more, and second ones that make up for it."""
        firsts = {method.stages[0].selector: method for method in reversed(ranked)}
        firsts = sorted(firsts.values(), key=ranked.index)[:_FIRSTS]
        return _drop_duplicates(
            self._paired(method.stages[0], second, method.eta, _MORE) for method in firsts for second in self._seconds()
        )

    @property
    def most_pairs(self) -> int:
        """Number of methods that `two_stages` gives at most."""
        return _FIRSTS * len(list(self._seconds()))

    def other_shares(self, methods: Sequence[Method]) -> list[Method]:
        """Other divisions of the work between two stages."""
        pairs = [method for method in methods if len(method.stages) == 2]
        alone = [self._scaled(method.stages[:1], method.eta) for method in pairs]
        return _drop_duplicates(
            self._paired(first.stages[0], method.stages[1], method.eta, more)
            for method, first in zip(pairs, alone, strict=True)
            if first is not None
            for more in OTHER_MORE
        )

    def other_ffns(self, methods: Sequence[Method], etas: Sequence[float | None]) -> list[Method]:
        """Methods of the same stages with other layers linear, and the tokens that these leave room for."""
        return _drop_duplicates(
            self._scaled(method.stages, eta) for method in methods for eta in etas if eta != method.eta
        )

    def _stages(self) -> Iterator[Stage]:
        depth = self.costs.dims.num_layers
        layers = sorted({*range(depth // 2 + 1), *self.recipe.prune.alternatives})
        for name in self.selectors:
            place = load_selector(name).place
            if place == "input":
                yield Stage(ratio=0, selector=name)
            else:
                first = _FIRST_LAYER[place]
                yield from (
                    Stage(layer=layer, ratio=0, selector=name) for layer in layers if first <= layer < depth - 1
                )

    def _scaled(self, stages: Sequence[Stage], eta: float | None) -> Method | None:
        """A method whose stages all keep the same multiple of what the given ones keep."""
        most = 1 - stages[0].ratio

        def at(ratio: float) -> list[tuple[Stage, float]]:
            return [(stage, _rounded(1 - (1 - ratio) * (1 - stage.ratio) / most)) for stage in stages]

        return self._fitted(at, eta)

    def _seconds(self) -> Iterator[Stage]:
        depth = self.costs.dims.num_layers
        layers = sorted({depth // part for part in _LATER})
        for name, layer in product(self.selectors, layers):
            if load_selector(name).place != "input" and 0 < layer < depth - 1:
                yield Stage(layer=layer, ratio=0, selector=name)

    def _paired(self, first: Stage, second: Stage, eta: float | None, more: float) -> Method | None:
        """A method of two stages, the first keeping `more` times as much as it would alone."""
        ratio = _rounded(1 - more * (1 - first.ratio))
        if ratio <= 0:
            return None
        method = self._fitted(lambda last: [(first, ratio), (second, max(ratio, last))], eta)
        # A second stage that drops nothing is none.
        return method if method is not None and method.stages[1].ratio > ratio else None

    def _fitted(self, at: Callable[[float], Sequence[tuple[Stage, float]]], eta: float | None) -> Method | None:
        """The method with the smallest ratio that meets the budget; None where there is none."""

        def cost(step: int) -> float:
            try:
                return self.share(_method(at(step / _GRID), eta))
            except CapaError:
                # Fewer tokens than a selector can choose cost less than those it can.
                return 0.0

        step = bisect_left(range(_GRID), -self.budget, key=lambda step: -cost(step))
        if step == _GRID or not (found := cost(step)):
            return None
        assert found <= self.budget
        return _method(at(step / _GRID), eta)

    def _least(self, stage: Stage) -> float:
        try:
            return self.share(_method([(stage, (_GRID - 1) / _GRID)], self.recipe.ffn.eta))
        except CapaError:
            return 1.0


def _method(stages: Sequence[tuple[Stage, float]], eta: float | None) -> Method:
    """A method of some stages, named as people would write it.

    Raises:
        CapaError: the stages do not go together.
    """
    text = "+".join(stage_text(stage, str(ratio)) for stage, ratio in stages)
    return parse_method(f"{text}/full" if eta is None else f"{text}/eta={eta}")


def _rounded(ratio: float) -> float:
    return min(round(ratio, 3), (_GRID - 1) / _GRID)


def _moved(stage: Stage, earlier: int) -> Stage:
    return stage if stage.chosen.place == "input" else stage.model_copy(update={"layer": stage.layer - earlier})


def _drop_duplicates(methods: Iterable[Method | None]) -> list[Method]:
    """The methods without None and duplicates; selectors that drop nothing are all the same."""
    found: dict[object, Method] = {}
    for method in methods:
        if method is not None:
            found.setdefault(method.name if any(stage.ratio for stage in method.stages) else method.eta, method)
    return list(found.values())
