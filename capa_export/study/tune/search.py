"""Successive halving: many methods on few samples, the best of them on more, and the finalists on samples of their own.

The finalists are judged on samples that chose none of them, since what was chosen on a sample looks better there than
it is.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from math import isnan
from statistics import fmean

from capa_export.base.progress import Report, say, tracked
from capa_export.config.schedule import Method
from capa_export.model.agreement import Agreement, DenseAnswer
from capa_export.study.tune.candidates import OTHER_MORE, Candidates

__all__ = ["FEWEST", "Search", "SearchResult", "mean_kl", "rungs"]

FEWEST = 11
"""Samples: eight of them judge, and with fewer no paired test of four finalists reaches 95 % for all of them."""
_REFINED = 6
_SURVIVORS = 12
_FINALISTS = 4


def rungs(count: int) -> tuple[int, int]:
    """Samples that all methods see, and those that the survivors see; the rest judges, whatever more there are."""
    return max(2, min(16, count // 8)), max(2, min(40, count // 3))


def mean_kl(agreements: Sequence[Agreement]) -> float:
    """Mean KL in nats; infinite where a method yields no number."""
    mean = fmean(agreement.kl for agreement in agreements)
    return float("inf") if isnan(mean) else mean


@dataclass(frozen=True)
class SearchResult:
    """The result of a search."""

    finalists: Mapping[str, Sequence[Agreement]]
    """Method -> its agreement on each of the judging samples, best first."""
    methods: Mapping[str, Method]
    tried: int


@dataclass
class Search:
    """One search for the best methods; deterministic."""

    candidates: Candidates
    etas: Sequence[float | None]
    """Etas that decide which visual FFNs become a scale; the recipe's first."""
    agreement: Callable[[Method, DenseAnswer], Agreement]
    report: Report
    methods: dict[str, Method] = field(default_factory=dict)
    seen: dict[str, list[Agreement]] = field(default_factory=dict)

    def run(self, own: Method | None, samples: Iterator[DenseAnswer], count: int) -> SearchResult:
        """Find the best methods; `own` is in the final whatever it shows before."""
        few, more = rungs(count)
        always = [] if own is None else [own]
        one_stage = self.candidates.one_stage()
        started = time.monotonic()
        first = list(islice(samples, few))
        refined = _REFINED * (len(OTHER_MORE) + len(self.etas) - 1)
        most = len(one_stage) + len(always) + self.candidates.most_pairs + refined
        runs = count + few * most + (more - few) * (_SURVIVORS + 1) + (count - more) * (_FINALISTS + 1)
        seconds = (time.monotonic() - started) / few
        say(
            f"tune          {len(one_stage)} schedules of one stage, at most {most} in all; {runs} answers, "
            f"{runs * seconds / 60:.1f} min at the {seconds:.2f} s that dense takes"
        )
        self._try(_named([*one_stage, *always]), first, "tune: one stage")
        self._try(self.candidates.two_stages(self._ranked()), first, "tune: two stages")
        self._try(self.candidates.other_shares(self._best(_REFINED, alike=1)), first, "tune: shares of stages")
        self._try(self.candidates.other_ffns(self._best(_REFINED, alike=1), self.etas), first, "tune: linear layers")
        tried = len(self.seen)
        self._keep(_named([*self._best(_SURVIVORS, alike=2), *always]))
        self._measure(islice(samples, more - few), more - few, "tune: survivors")
        self._keep(_named([*self._best(_FINALISTS, alike=1), *always]))
        self.seen = {name: [] for name in self.methods}
        self._measure(islice(samples, count - more), count - more, "tune: final")
        ranked = [method.name for method in self._ranked()]
        return SearchResult({name: self.seen[name] for name in ranked}, self.methods, tried)

    def _try(self, methods: Sequence[Method], samples: Sequence[DenseAnswer], what: str) -> None:
        """Run the methods that were not tried yet on the samples."""
        fresh = [method for method in methods if method.name not in self.seen]
        self.methods |= {method.name: method for method in fresh}
        pairs = [(sample, method) for method in fresh for sample in samples]
        for sample, method in tracked(pairs, what, len(pairs), self.report):
            self.seen.setdefault(method.name, []).append(self.agreement(method, sample))

    def _measure(self, samples: Iterable[DenseAnswer], count: int, what: str) -> None:
        """Show further samples to all that are left."""
        for sample in tracked(samples, what, count, self.report):
            for name, method in self.methods.items():
                self.seen[name].append(self.agreement(method, sample))

    def _ranked(self) -> list[Method]:
        return [self.methods[name] for name in sorted(self.seen, key=lambda name: (mean_kl(self.seen[name]), name))]

    def _best(self, count: int, *, alike: int) -> list[Method]:
        """The best methods, at most `alike` with the same selectors: samples that flatter one flatter all like it."""
        taken: Counter[tuple[str, ...]] = Counter()
        found: list[Method] = []
        for method in self._ranked():
            selectors = tuple(stage.selector for stage in method.stages)
            taken[selectors] += 1
            if taken[selectors] <= alike:
                found.append(method)
        return found[:count]

    def _keep(self, methods: Sequence[Method]) -> None:
        self.methods = {method.name: method for method in methods}
        self.seen = {name: self.seen[name] for name in self.methods}


def _named(methods: Iterable[Method]) -> list[Method]:
    return list({method.name: method for method in methods}.values())
