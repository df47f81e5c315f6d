"""Candidates spend the budget and no more."""

from dataclasses import replace
from typing import Any

import pytest

from capa_export.base.errors import CapaError
from capa_export.calibrate.sums import Calibration
from capa_export.config.recipe import FFN, Recipe
from capa_export.config.schedule import Prune, parse_method
from capa_export.model.families import load_family
from capa_export.selectors.selector import selectors
from capa_export.study.tune.candidates import Candidates, ffns, linear_layers, offered
from tests.calibrate.effects import harmless


def with_schedule(candidates: Candidates, *stages: dict[str, object]) -> Candidates:
    prune = Prune.model_validate({"schedule": stages})
    return replace(candidates, recipe=candidates.recipe.model_copy(update={"prune": prune}))


def test_one_stage_just_meets_the_budget(candidates: Candidates) -> None:
    found = candidates.one_stage()
    for method in found:
        (stage,) = method.stages
        more = parse_method(method.name.replace(f":{stage.ratio}", f":{round(stage.ratio - 0.001, 3)}"))
        assert candidates.share(method) <= 0.4 < candidates.share(more)
        assert method.eta == candidates.recipe.ffn.eta
    layers = {(method.stages[0].selector, method.stages[0].layer) for method in found}
    assert {("capa", 0), ("capa", 1), ("fastv", 1), ("divprune", -1), ("vispruner", -1)} <= layers
    assert ("fastv", 0) not in layers
    assert len(layers) == len(found)


def test_a_selector_left_out_is_not_tried(candidates: Candidates) -> None:
    found = replace(candidates, selectors=("capa", "dart")).one_stage()
    assert {method.stages[0].selector for method in found} == {"capa", "dart"}


def test_nothing_dropped_is_tried_once(candidates: Candidates) -> None:
    found = replace(candidates, budget=0.99).one_stage()
    assert len([method for method in found if method.stages[0].ratio == 0]) == 1


def test_impossible_budget_says_what_is_possible(candidates: Candidates) -> None:
    tight = replace(candidates, budget=candidates.costs.text)
    with pytest.raises(CapaError, match="is less than any schedule costs on these samples") as error:
        tight.one_stage()
    least = float(str(error.value).partition("which is ")[2].split(";")[0])
    assert candidates.costs.text < least < 0.4
    assert replace(candidates, budget=least + 1e-4).one_stage()


def test_own_schedule_is_scaled_to_the_budget(candidates: Candidates) -> None:
    own, earlier = candidates.own()
    assert own is not None and earlier == 0
    assert own in candidates.one_stage()
    assert [(stage.selector, stage.layer) for stage in own.stages] == [("capa", 1)]


def test_own_stages_keep_their_proportion(candidates: Candidates) -> None:
    two = with_schedule(candidates, {"selector": "divprune", "ratio": 0.5}, {"layer": 2, "ratio": 0.75})
    own, _ = two.own()
    assert own is not None and candidates.share(own) <= 0.4
    first, second = own.stages
    assert 1 - second.ratio == pytest.approx((1 - first.ratio) / 2, abs=1e-3)


def test_own_schedule_moves_earlier_where_it_must(candidates: Candidates) -> None:
    late = with_schedule(candidates, {"layer": 3, "ratio": 0.75})
    own, earlier = late.own()
    assert own is not None and own.stages[0].layer == 3 - earlier
    later = f"capa@{4 - earlier}:0.999/eta=0.5"
    assert earlier > 0 and candidates.share(parse_method(later)) > 0.4


def test_own_schedule_that_fits_nowhere(candidates: Candidates) -> None:
    assert replace(candidates, budget=candidates.costs.text).own() == (None, 0)


def test_two_stages_spend_the_budget(candidates: Candidates) -> None:
    ranked = candidates.one_stage()
    alone = {(method.stages[0].selector, method.stages[0].layer): method.stages[0].ratio for method in ranked}
    found = candidates.two_stages(ranked)
    assert 0 < len(found) <= candidates.most_pairs
    for method in found:
        first, second = method.stages
        assert 1 - first.ratio == pytest.approx(1.5 * (1 - alone[first.selector, first.layer]), abs=1e-3)
        assert first.ratio < second.ratio and first.layer < second.layer
        assert 0.35 < candidates.share(method) <= 0.4
    assert len({method.stages[0].selector for method in found}) <= 3
    assert {("capa", 1), ("fastv", 1)} <= {(method.stages[1].selector, method.stages[1].layer) for method in found}


def test_the_best_first_stages_get_a_second_one(candidates: Candidates) -> None:
    ranked = sorted(candidates.one_stage(), key=lambda method: method.stages[0].selector != "dart")
    assert candidates.two_stages(ranked)[0].stages[0].selector == "dart"


def test_other_shares_of_two_stages(candidates: Candidates) -> None:
    tight = replace(candidates, budget=0.18)
    ranked = [method for method in tight.one_stage() if method.stages[0].selector == "dart"]
    pair = next(method for method in tight.two_stages(ranked) if method.stages[1].selector == "capa")
    found = tight.other_shares([pair, *ranked])
    keeps = [(1 - method.stages[0].ratio) / (1 - ranked[0].stages[0].ratio) for method in found]
    assert keeps and keeps == pytest.approx([1.2, 2.0, 3.0][: len(keeps)], rel=0.01)
    assert all(method.stages[0].ratio < method.stages[1].ratio for method in found)
    assert all(tight.share(method) <= 0.18 for method in found)


def test_other_ffns_leave_room_for_other_ratios(candidates: Candidates) -> None:
    method = parse_method("capa@1:0.8/eta=0.5")
    full, some = candidates.other_ffns([method], [0.5, None, 0.93])
    assert (full.ffn, full.eta, some.ffn, some.eta) == ("full", None, "scale", 0.93)
    assert full.stages[0].ratio > some.stages[0].ratio
    assert max(candidates.share(full), candidates.share(some)) <= 0.4


def test_linear_layers(recipe: Recipe, calibration: Calibration) -> None:
    def of(text: str) -> tuple[int, ...]:
        return linear_layers(parse_method(text), recipe, calibration)

    assert of("capa@1:0.5") == (1, 2, 3, 4)
    assert of("capa@1:0.5/eta=0.93") == (3, 4)
    assert of("capa@1:0.5/full") == ()


def etas(calibration: Calibration, eta: float, **changes: Any) -> list[float | None]:
    ffn = FFN(eta=eta)
    return ffns(ffn, harmless(replace(calibration, **changes), ffn))


def test_one_eta_for_every_set_of_layers(calibration: Calibration) -> None:
    assert etas(calibration, 0.5) == [0.5, 0.9, 0.93, 0.95, 0.97]
    assert etas(calibration, 0.96) == [0.96, 0.9, 0.93, 0.95]
    assert etas(calibration, 0.5, layers=calibration.layers[-1:] * 2) == [0.5, 0.97]


def test_no_eta_leaves_all_ffns(calibration: Calibration) -> None:
    layer = replace(calibration.layers[0], visual_cosine=0.995)
    assert etas(calibration, 0.5, layers=[layer]) == [0.5, None]


def test_a_family_whose_tower_says_nothing() -> None:
    can, cannot = offered(load_family("qwen3vl"))
    assert cannot == ("adafv-style", "vispruner")
    assert sorted((*can, *cannot)) == list(selectors())
    assert offered(load_family("qwen25vl")) == (selectors(), ())
