"""What a method costs is what the plan says, summed over the prompts."""

import pytest

from capa_export.base.errors import CapaError
from capa_export.config.schedule import parse_method
from capa_export.model.source import Source
from capa_export.plan.flops import flops
from capa_export.selectors.selector import SelectorChoice
from capa_export.study.tune.costs import Costs


def test_share_is_the_plans(costs: Costs, source: Source) -> None:
    method = parse_method("divprune:0.5+fastv@3:0.9")
    selectors = {-1: SelectorChoice("divprune"), 3: SelectorChoice("fastv")}
    capa = dense = text = 0
    for visual, words, kept, times in [(96, 30, (48, 10), 1), (256, 20, (128, 26), 2)]:
        found = flops(
            source.dims.decoder,
            num_visual=visual,
            num_text=words,
            schedule=list(zip((-1, 3), kept, strict=True)),
            linear_layers=(3, 4),
            selectors=selectors,
        )
        alone = flops(source.dims.decoder, num_visual=0, num_text=words, schedule=(), linear_layers=())
        capa, dense = capa + times * found.capa.total, dense + times * found.dense.total
        text += times * alone.dense.total
    assert costs.share(method, (3, 4)) == capa / dense
    assert costs.dense == dense
    assert costs.text == text / dense


def test_budget_as_a_fraction_or_a_number(costs: Costs) -> None:
    assert costs.share_of(0.25) == 0.25
    assert costs.share_of(costs.dense / 3 / 4) == pytest.approx(0.25)


@pytest.mark.parametrize("budget", [0.0, -0.5, float("inf"), float("nan")])
def test_no_budget(costs: Costs, budget: float) -> None:
    with pytest.raises(CapaError, match="must be a fraction of dense"):
        costs.share_of(budget)


def test_dense_within_the_budget(costs: Costs) -> None:
    with pytest.raises(CapaError, match="FLOPs a prompt, which is no more"):
        costs.share_of(costs.dense / 3)


def test_less_than_text_costs(costs: Costs) -> None:
    with pytest.raises(CapaError, match=r"text alone takes \S+ FLOPs a prompt, 0\.\d+ of dense"):
        costs.share_of(costs.text)


def test_too_few_tokens_for_a_selector(costs: Costs) -> None:
    with pytest.raises(CapaError, match="selector dart chooses 4 tokens or more"):
        costs.share(parse_method("dart:0.999"), ())
