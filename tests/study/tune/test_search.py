"""The search itself, where what is measured is made up."""

from typing import Any, cast

import pytest

from capa_export.base.progress import silent
from capa_export.base.statistics import difference_of_means
from capa_export.config.schedule import Method, parse_method
from capa_export.model.agreement import Agreement
from capa_export.study.tune.candidates import Candidates
from capa_export.study.tune.search import FEWEST, Search, SearchResult, rungs

ETAS = (0.5, 0.93, None)
COUNT = 48


def worth(method: Method) -> float:
    """Two stages that begin with dart are best, and all the better with few linear layers; capa at layer 1 is worst."""
    if method.name.startswith("capa@1"):
        return 9.0
    base = 1.0 + sum(map(ord, method.name)) % 97 / 97
    dart = method.stages[0].selector == "dart"
    return base - 0.3 * dart - 0.3 * (dart and len(method.stages) == 2) - 0.3 * (method.eta == 0.93)


class Measured:
    """Notes what is asked; samples are numbers, and no method is as good on the first ones as later."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []

    def __call__(self, method: Method, sample: Any) -> Agreement:
        self.asked.append((method.name, sample))
        return Agreement(worth(method) + sample / 1000, 1.0)


def searched(candidates: Candidates, measured: Any, own: Method | None, count: int = COUNT) -> SearchResult:
    return Search(candidates, ETAS, measured, silent).run(own, cast("Any", iter(range(count))), count)


def test_the_best_is_found_and_own_is_in_the_final(candidates: Candidates) -> None:
    own, _ = candidates.own()
    assert own is not None
    measured = Measured()
    found = searched(candidates, measured, own)
    *better, last = found.finalists
    assert last == own.name and len(better) == 4
    kinds = {tuple(stage.selector for stage in found.methods[name].stages) for name in better}
    assert len(kinds) == 4
    best = min({name for name, _ in measured.asked}, key=lambda name: worth(parse_method(name)))
    assert better[0] == best
    assert found.methods[best].stages[0].selector == "dart" and len(found.methods[best].stages) == 2
    assert found.tried == len({name for name, _ in measured.asked})


def test_nothing_is_asked_twice_and_finalists_are_judged_on_samples_of_their_own(candidates: Candidates) -> None:
    own, _ = candidates.own()
    measured = Measured()
    found = searched(candidates, measured, own)
    few, more = rungs(COUNT)
    assert (few, more) == (6, 16)
    assert len(set(measured.asked)) == len(measured.asked)
    assert len({name for name, sample in measured.asked if few <= sample < more}) <= 13
    assert {name for name, sample in measured.asked if sample >= more} == set(found.finalists)
    assert {len(agreements) for agreements in found.finalists.values()} == {COUNT - more}
    assert found.finalists[next(iter(found.finalists))][0].kl > more / 1000


def test_no_more_is_asked_than_is_said(candidates: Candidates, capsys: pytest.CaptureFixture[str]) -> None:
    own, _ = candidates.own()
    measured = Measured()
    searched(candidates, measured, own)
    said = capsys.readouterr().err
    assert len(measured.asked) + COUNT <= int(said.partition("in all; ")[2].split()[0])


def test_the_same_again(candidates: Candidates) -> None:
    own, _ = candidates.own()
    assert searched(candidates, Measured(), own) == searched(candidates, Measured(), own)


def test_without_own(candidates: Candidates) -> None:
    assert len(searched(candidates, Measured(), None).finalists) == 4


def test_what_is_no_number_comes_last(candidates: Candidates) -> None:
    own, _ = candidates.own()
    assert own is not None
    measured = Measured()

    def broken(method: Method, sample: Any) -> Agreement:
        return Agreement(float("nan"), 0) if "dart" in method.name or method == own else measured(method, sample)

    names = list(searched(candidates, broken, own).finalists)
    assert not any("dart" in name for name in names)
    assert names[-1] == own.name


def test_the_fewest_samples_leave_enough_to_judge_to_be_sure_of_one_finalist_of_four() -> None:
    judges = FEWEST - rungs(FEWEST)[1]
    assert difference_of_means([1.0] * judges, [0.0] * judges, 1 - 0.05 / 4).low > 0
    judges = FEWEST - 1 - rungs(FEWEST - 1)[1]
    assert difference_of_means([1.0] * judges, [0.0] * judges, 1 - 0.05 / 4).low == 0
    assert rungs(64) == (8, 21)
    assert rungs(256) == (16, 40)
