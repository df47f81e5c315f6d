"""What is explained is what the eager model does, run by hand here."""

from pathlib import Path

import numpy as np
import pytest
import torch

from capa_export.base.errors import CapaError
from capa_export.calibrate.sums import Calibration
from capa_export.data.picture_files import open_picture
from capa_export.model.eager import Eager
from capa_export.model.eager_plan import EagerPlan, inputs_for
from capa_export.model.families import qwen25vl
from capa_export.model.prompt import Turn
from capa_export.selectors.selector import SelectorChoice, selectors
from capa_export.study.explain.schema import Explanation, MethodExplanation
from tests.building import Building
from tests.study.explain.conftest import ANCHOR, DUMP, QUESTION, building_of, explained, recipe_of


@pytest.fixture(scope="module")
def found(bundle: Path, pictures: Path) -> Explanation:
    return explained(building_of(bundle), [pictures / "one" / "wide.png"], QUESTION, max_new_tokens=4)[0]


def method_of(found: Explanation, name: str) -> MethodExplanation:
    return next(method for method in found.methods if method.method == name)


def test_every_selector_has_its_turn_at_the_ratio_and_layer_of_the_bundle(found: Explanation) -> None:
    names = [method.method for method in found.methods]
    assert names[:3] == ["dense", "capa@2:0.75", "random@2:0.75"]
    assert not found.left_out
    assert {name.partition("@")[0].partition(":")[0] for name in names[1:]} == set(selectors())
    assert [method.own for method in found.methods] == [name == "capa@2:0.75" for name in names]
    assert "divprune:0.75" in names, "before the decoder, where it acts"
    assert "fastv@2:0.75" in names, "at the bundle's layer"
    for method in found.methods[1:]:
        assert len(method.kept) == 5 == method.stages[0].kept
        assert list(method.kept) == sorted(set(method.kept))
    assert found.methods[0].kept == tuple(range(20))
    assert found.methods[0].iou == 5 / 20
    assert found.methods[0].kl == 0


@pytest.mark.parametrize(("name", "chosen"), [("capa@2:0.75", "capa"), ("attention@2:0.75", "attention")])
def test_the_numbers_are_those_of_the_eager_run(
    found: Explanation, bundle: Path, pictures: Path, name: str, chosen: str
) -> None:
    building = building_of(bundle)
    prompt = building.model.prompter.chat([Turn("user", [open_picture(pictures / "one" / "wide.png"), QUESTION])])
    is_visual, first = torch.from_numpy(prompt.is_visual), int(np.flatnonzero(prompt.is_visual)[0])
    calibration = Calibration.load(bundle)
    linear = calibration.linear_layers(0.5)
    assert found.linear_layers == linear
    assert linear, "or this would not see that scales are left out"
    scales = {layer: torch.from_numpy(calibration.layers[layer].alpha).float() for layer in linear}
    plan = EagerPlan({2: 5}, scales, {2: SelectorChoice(chosen)}, min_keep_per_image=1)
    eager, inputs = Eager(building.model.eager), inputs_for(plan, qwen25vl, building.model.eager, prompt)
    run, dense = (eager.prefill(inputs, is_visual, each) for each in (plan, EagerPlan()))
    p, q = (each.logits.double().softmax(-1) for each in (dense, run))
    kept = [int(row) - first for row in run.kept[2] if is_visual[row]]
    answer, logits = [], run.logits
    for step in range(4):
        answer.append(int(logits.argmax()))
        logits = eager.step(run, answer[-1], run.next_position + step)

    method = method_of(found, name)
    assert method.kept == tuple(kept)
    assert method.kl == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-6)
    own = method_of(found, "capa@2:0.75").kept
    shared = len(set(kept) & set(own))
    assert method.iou == shared / (10 - shared)
    assert method.answer == building.model.prompter.decode(answer).strip()
    assert method.same_answer == (method.answer == method_of(found, "dense").answer)


def test_capa_at_that_layer_is_what_the_maps_say(found: Explanation) -> None:
    order = np.argsort(found.maps.contribution)[::-1]
    assert method_of(found, "capa@2:0.75").kept == tuple(sorted(order[:5].tolist())) == found.maps.kept
    assert found.maps.cut == found.maps.contribution[order[4]]
    by_attention = np.argsort(found.maps.attention)[::-1][:5]
    assert method_of(found, "attention@2:0.75").kept == tuple(sorted(by_attention.tolist()))


def test_a_model_without_sinks_says_how_they_were_looked_for(found: Explanation) -> None:
    assert found.sinks.channels == found.sinks.dumps == found.sinks.anchors == ()
    words = " ".join(found.sinks.words)
    assert "over 20 visual tokens of 1 calibration sample: no sinks in this model" in words
    assert "at most sqrt(64) = 8.0 times the RMS" in words


def test_sinks_are_told_apart_by_what_capa_drops(sink_bundle: Path, pictures: Path) -> None:
    methods = ["attention@2:0.75"]
    found, _ = explained(building_of(sink_bundle), [pictures / "one" / "wide.png"], QUESTION, methods, max_new_tokens=2)
    assert found.sinks.channels == (5, 9)
    assert found.sinks.dumps == (DUMP,)
    assert found.sinks.anchors == (ANCHOR,)
    phi = np.asarray(found.maps.phi)
    assert set(np.flatnonzero(phi > 20)) == {DUMP, ANCHOR}
    assert found.maps.value_norm[DUMP] < found.maps.value_norm[ANCHOR]
    assert "CAPA drops 1, the probability dumps, and keeps 1, the structural anchors" in found.sinks.words[1]
    assert "The line between the two is ours" in found.sinks.words[1]


def test_without_a_calibration_and_with_several_pictures(plain_bundle: Path, pictures: Path) -> None:
    shown = [pictures / "one" / "wide.png", pictures / "tall.png"]
    found, surfaces = explained(building_of(plain_bundle), shown, QUESTION, max_new_tokens=2)
    assert found.visual_tokens == 26 == len(found.maps.contribution)
    assert [(grid.picture, grid.first, grid.rows, grid.cols) for grid in found.grids] == [(0, 0, 4, 5), (1, 20, 3, 2)]
    assert [surface.image.size for surface in surfaces] == [(140, 112), (56, 84)]
    assert found.methods[1].method == "divprune:0.5/full"
    assert {method.method.rpartition("/")[2] for method in found.methods[1:]} == {"full"}
    assert found.maps.layer == 2
    assert len(found.maps.kept) == 13
    assert "this prompt alone, since the bundle has no calibration" in found.sinks.words[0]
    assert found.linear_layers == ()


def test_what_a_family_cannot_do_is_left_out_unless_it_is_asked_for(
    bundle: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_family: object, selector: str) -> None:
        raise CapaError(f"selector {selector} needs the vision tower's attention")

    monkeypatch.setattr("capa_export.model.model.require_selection", refuse)
    shown = [pictures / "one" / "wide.png"]
    found, _ = explained(building_of(bundle), shown, QUESTION, max_new_tokens=1)
    left_out = {entry.method: entry.reason for entry in found.left_out}
    assert set(left_out) == {"vispruner:0.75", "adafv-style:0.75"}
    assert left_out["vispruner:0.75"] == "selector vispruner needs the vision tower's attention"
    with pytest.raises(CapaError, match=r"method vispruner:0\.5: selector vispruner needs"):
        explained(unopened(bundle), shown, QUESTION, ["vispruner:0.5"])


def test_too_few_tokens_for_a_selector(bundle: Path, pictures: Path) -> None:
    """DART keeps its four pivots."""
    shown = [pictures / "tall.png"]
    found, _ = explained(building_of(bundle), shown, QUESTION, max_new_tokens=1)
    (left_out,) = found.left_out
    assert left_out.method == "dart:0.75"
    assert "chooses 4 tokens or more" in left_out.reason
    with pytest.raises(CapaError, match=r"method dart:0\.75: selector dart chooses 4 tokens or more"):
        explained(unopened(bundle), shown, QUESTION, ["dart:0.75"])


def test_a_schedule_of_several_stages(bundle: Path, pictures: Path) -> None:
    building = building_of(bundle)
    stages = [{"layer": 1, "ratio": 0.5}, {"layer": 3, "ratio": 0.75, "selector": "attention"}]
    building.recipe = recipe_of(schedule=stages)
    found, _ = explained(building, [pictures / "one" / "wide.png"], QUESTION, ["dense"], max_new_tokens=1)
    own = method_of(found, "capa@1:0.5+attention@3:0.75")
    assert own.own
    assert [(stage.where, stage.selector, stage.kept) for stage in own.stages] == [
        ("after layer 1", "capa", 10),
        ("after layer 3", "attention", 5),
    ]
    assert (found.maps.layer, len(found.maps.kept)) == (1, 10)
    assert set(own.kept) < set(found.maps.kept), "layer 1 is where CAPA chose for the stage behind"


def unopened(bundle: Path) -> Building:
    """A building whose model must not be loaded."""
    building = building_of(bundle)
    vars(building.model)["eager"] = None
    return building


@pytest.mark.parametrize(
    ("methods", "layer", "message"),
    [
        (["vizpruner:0.5"], None, "unknown selector 'vizpruner'"),
        (["capa@4:0.5"], None, "method capa@4:0.5: .* decoder has layers 0 to 4"),
        ([], 4, "--layer 4: what is dropped at layers 0 to 3"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_model_is_loaded(
    bundle: Path, pictures: Path, methods: list[str], layer: int | None, message: str
) -> None:
    with pytest.raises(CapaError, match=message):
        explained(unopened(bundle), [pictures / "one" / "wide.png"], QUESTION, methods, layer=layer)


def test_a_model_that_exceeds_memory_is_not_loaded(
    bundle: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("capa_export.model.memory.available_memory", lambda: 1000)
    with pytest.raises(CapaError, match=r"the model takes 0.5 GB in FP32, 0.0 GB are free; end other programs"):
        explained(unopened(bundle), [pictures / "tall.png"], QUESTION)


def test_scales_need_a_calibration(plain_bundle: Path, pictures: Path) -> None:
    with pytest.raises(CapaError, match=r"has no calibration to replace visual FFNs from; write capa@2:0.5/full"):
        explained(unopened(plain_bundle), [pictures / "tall.png"], QUESTION, ["capa@2:0.5"])


def test_the_bundles_own_is_shown_once(bundle: Path, pictures: Path) -> None:
    methods = ["capa@2:0.75", "capa@2:0.75/full", "dense"]
    found, _ = explained(building_of(bundle), [pictures / "tall.png"], QUESTION, methods, max_new_tokens=1)
    assert [method.method for method in found.methods] == ["dense", "capa@2:0.75", "capa@2:0.75/full"]
