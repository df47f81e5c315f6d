"""The choice of layers: KL by hand, bisection, budgets, streamed weights, and what a build makes of it."""

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from capa_export.base.errors import CapaError
from capa_export.bundle.store import Bundle
from capa_export.calibrate.effect import measure_effect
from capa_export.calibrate.measure import calibrate
from capa_export.calibrate.scaled_sets import EFFECT, FfnEffect, ScaledSet
from capa_export.calibrate.stage import adopt_calibration
from capa_export.calibrate.sums import Calibration
from capa_export.config.recipe import FFN, Recipe, load_recipe
from capa_export.data.samples import Samples, samples_from
from capa_export.model.eager import Eager
from capa_export.model.eager_plan import EagerInputs, EagerPlan
from capa_export.model.families import qwen25vl
from capa_export.model.prompt import Prompter
from capa_export.model.source import Source
from capa_export.model.streamed import StoredWeights, hollow_model
from tests.building import Building
from tests.calibrate.effects import harmless
from tests.conftest import noise

ALL = FFN(eta=0.5, budget=100)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for index in range(6):
        noise(84 + 28 * (index % 2), 84, index).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def samples(pictures: Path) -> Samples:
    return samples_from(pictures, load_recipe("qwen25vl"), 3, split="judge")


@pytest.fixture(scope="module")
def calibration(model: Any, prompter: Prompter, pictures: Path) -> Calibration:
    train = samples_from(pictures, load_recipe("qwen25vl"), 4, split="train")
    return calibrate(model, qwen25vl, prompter, train, checkpoint_digest="x")


def effect_of(
    eager: Eager, prompter: Prompter, samples: Samples, calibration: Calibration, ffn: FFN, ratio: float = 0
) -> FfnEffect:
    recipe = load_recipe("qwen25vl").with_options(ratio=ratio, prune_layer=1).model_copy(update={"ffn": ffn})
    return measure_effect(eager, qwen25vl, prompter, samples, calibration, recipe, stop=())


@pytest.fixture(scope="module")
def every(model: Any, prompter: Prompter, samples: Samples, calibration: Calibration) -> FfnEffect:
    return effect_of(Eager(model), prompter, samples, calibration, ALL)


@pytest.fixture(scope="module")
def none(model: Any, prompter: Prompter, samples: Samples, calibration: Calibration) -> FfnEffect:
    return effect_of(Eager(model), prompter, samples, calibration, FFN(eta=0.5, budget=0))


def kl_by_hand(
    model: Any, prompter: Prompter, samples: Samples, calibration: Calibration, layers: Sequence[int]
) -> float:
    """Mean KL with Hugging Face's own forward pass, whose FFNs answer alpha x - x for visual tokens."""
    text, divergences = model.model.language_model, list[float]()
    for sample in samples:
        prompt = prompter.chat(sample.turns)
        embeds, positions = EagerInputs.of(qwen25vl.eager_inputs(model, prompt))[:2]
        said = list[int]()
        dense = list[torch.Tensor]()
        for _ in range(4):
            dense.append(_logits(model, embeds, positions, said)[-1])
            said.append(int(dense[-1].argmax()))
        is_visual = torch.from_numpy(prompt.is_visual)
        handles = []
        for layer in layers:
            entering = list[torch.Tensor]()

            def before(_: Any, inputs: tuple[torch.Tensor, ...], entering: list[torch.Tensor] = entering) -> None:
                entering[:] = [inputs[0]]

            alpha = torch.from_numpy(calibration.layers[layer].alpha).float()
            scaled = partial(_scaled, alpha=alpha, is_visual=is_visual, entering=entering)
            handles.append(text.layers[layer].post_attention_layernorm.register_forward_pre_hook(before))
            handles.append(text.layers[layer].mlp.register_forward_hook(scaled))
        found = _logits(model, embeds, positions, said[:-1])
        for handle in handles:
            handle.remove()
        pairs = [(p.double().log_softmax(-1), q.double().log_softmax(-1)) for p, q in zip(dense, found, strict=True)]
        divergences.append(sum(float((p.exp() * (p - q)).sum()) for p, q in pairs) / len(pairs))
    return sum(divergences) / len(divergences)


def _scaled(
    _ffn: Any,
    _inputs: Any,
    output: torch.Tensor,
    *,
    alpha: torch.Tensor,
    is_visual: torch.Tensor,
    entering: list[torch.Tensor],
) -> torch.Tensor:
    visual = torch.nn.functional.pad(is_visual, (0, output.shape[1] - len(is_visual)))
    return torch.where(visual[:, None], entering[0] * (alpha - 1), output)


@torch.no_grad()
def _logits(model: Any, embeds: torch.Tensor, positions: torch.Tensor, said: Sequence[int]) -> torch.Tensor:
    """Logits behind the prompt and behind each token that was said."""
    more = positions.max() + 1 + torch.arange(len(said)).expand(3, 1, -1)
    table = model.model.language_model.embed_tokens
    behind = table(torch.tensor([list(said)], dtype=torch.long))
    return model(
        inputs_embeds=torch.cat([embeds, behind], dim=1), position_ids=torch.cat([positions, more], dim=-1)
    ).logits[0, embeds.shape[1] - 1 :]


def test_the_kl_of_a_set_is_that_of_the_model_itself(
    every: FfnEffect, model: Any, prompter: Prompter, samples: Samples, calibration: Calibration
) -> None:
    (only,) = every.tried
    assert only.layers == calibration.linear_layers(0.5) == every.chosen.layers
    assert len(only.layers) > 2
    assert only.kl == pytest.approx(kl_by_hand(model, prompter, samples, calibration, only.layers), rel=1e-3)
    assert only.kl > 1e-4
    assert 0 <= only.agreement <= 1


def test_sets_grow_by_the_layers_of_least_harm(none: FfnEffect, calibration: Calibration) -> None:
    linear = calibration.linear_layers(0.5)
    order = sorted(linear, key=lambda layer: calibration.layers[layer].relative_error)
    assert none.tried[0].layers == linear
    assert all(one.layers == tuple(sorted(order[: len(one.layers)])) for one in none.tried)
    assert len(none.tried) <= 1 + len(linear).bit_length()
    # What leaves the last layer at a visual token is read by nobody.
    assert none.chosen == ScaledSet(layers=(4,), kl=0, agreement=1)
    assert order[0] == 4


def test_the_largest_set_within_the_budget(
    none: FfnEffect, model: Any, prompter: Prompter, samples: Samples, calibration: Calibration
) -> None:
    smallest = none.tried[-2]
    assert smallest.kl is not None
    found = effect_of(Eager(model), prompter, samples, calibration, FFN(eta=0.5, budget=smallest.kl))
    assert found.chosen == max((one for one in found.tried if one.within(smallest.kl)), key=lambda one: len(one.layers))
    assert set(found.chosen.layers) >= set(smallest.layers)
    assert "in all" in found.words and "a scale in layer" in found.words


def test_what_pruning_costs_is_not_counted(
    every: FfnEffect, model: Any, prompter: Prompter, samples: Samples, calibration: Calibration
) -> None:
    eager, layers = Eager(model), calibration.linear_layers(0.5)
    found = effect_of(eager, prompter, samples, calibration, ALL, ratio=0.75)
    assert found.schedule == "capa@1:0.75" and every.schedule == "capa@1:0"
    scales = {layer: torch.from_numpy(calibration.layers[layer].alpha).float() for layer in layers}
    divergences = list[float]()
    for sample in samples:
        prompt = prompter.chat(sample.turns)
        inputs = EagerInputs.of(qwen25vl.eager_inputs(model, prompt))
        is_visual, keep = torch.from_numpy(prompt.is_visual), {1: -(-prompt.num_visual // 4)}
        run, said = eager.prefill(inputs, is_visual, EagerPlan()), list[int]()
        logits = run.logits
        for step in range(3):
            said.append(int(logits.argmax()))
            logits = eager.step(run, said[-1], run.next_position + step)
        plans = (EagerPlan(keep, min_keep_per_image=1), EagerPlan(keep, scales, min_keep_per_image=1))
        full, scaled = (_along(eager, inputs, is_visual, plan, said) for plan in plans)
        pairs = [(p.double().log_softmax(-1), q.double().log_softmax(-1)) for p, q in zip(full, scaled, strict=True)]
        divergences += [sum(float((p.exp() * (p - q)).sum()) for p, q in pairs) / len(pairs)]
    assert found.tried[0].kl == pytest.approx(sum(divergences) / len(divergences), rel=1e-6)
    assert found.tried[0].kl != pytest.approx(every.tried[0].kl, rel=0.01)


def _along(
    eager: Eager, inputs: EagerInputs, is_visual: torch.Tensor, plan: EagerPlan, said: Sequence[int]
) -> list[torch.Tensor]:
    run = eager.prefill(inputs, is_visual, plan)
    return [run.logits, *(eager.step(run, token, run.next_position + step) for step, token in enumerate(said))]


def test_no_linear_layer_asks_nothing(model: Any, prompter: Prompter, calibration: Calibration) -> None:
    found = effect_of(Eager(model), prompter, nothing_asked(), calibration, FFN(eta=0.999999))
    assert (found.tried, found.chosen.layers, found.words) == ((), (), "no layer is linear")


def nothing_asked() -> Samples:
    class Silent(Samples):
        def __iter__(self) -> Any:
            raise AssertionError("a sample was read")

    return Silent(count=0, name="none", has_answers=False)


def test_streamed_weights_choose_the_same(
    every: FfnEffect, prompter: Prompter, samples: Samples, calibration: Calibration, source: Source
) -> None:
    weights = StoredWeights(source)
    assert effect_of(Eager(hollow_model(source, weights), weights), prompter, samples, calibration, ALL) == every


def test_no_number_is_beyond_any_budget() -> None:
    broken = ScaledSet(layers=(1,), kl=float("nan"), agreement=0)
    assert broken.kl is None and not broken.within(100)


def test_the_set_of_most_layers_within_the_budget_is_chosen() -> None:
    tried = [
        ScaledSet(layers=layers, kl=kl, agreement=1) for layers, kl in (((1, 2, 3), 0.2), ((1,), 0), ((1, 2), 0.1))
    ]
    found = FfnEffect(calibration="x", eta=0.5, budget=0.1, schedule="", samples=1, tried=tuple(tried))
    assert found.chosen == tried[2]


def test_judges_are_kept_apart() -> None:
    recipe = load_recipe("qwen25vl")
    parts = {split: _part(recipe, split) for split in ("train", "judge", "held_out")}
    assert [len(part) for part in parts.values()] == [51, 17, 32]
    assert len(set.union(*parts.values())) == 100


def _part(recipe: Recipe, split: Any) -> set[int]:
    from capa_export.data.samples import _split

    return set(_split(tuple(range(100)), recipe, split))


def test_a_build_takes_what_was_chosen(checkpoint: Path, pictures: Path, tmp_path: Path, capsys: Any) -> None:
    """Another budget measures the effect again, and nothing else; the export follows."""
    recipe = load_recipe("qwen25vl").model_copy(update={"ffn": ALL})
    building = Building.of(recipe, Bundle(tmp_path / "out"), checkpoint, images=pictures, samples=2)
    found = building.calibrate()
    assert found.effect is not None and found.effect.samples == 2
    assert FfnEffect.load(tmp_path / "out" / EFFECT) == found.effect
    assert "a scale in layers" in capsys.readouterr().err
    building.export()
    manifest = building.bundle.manifest["stages"]
    assert tuple(manifest["export"]["result"]["linear_layers"]) == found.linear_layers(0.5)

    tight = building.again(recipe=recipe.model_copy(update={"ffn": FFN(eta=0.5, budget=0)}))
    fewer = tight.calibrate()
    said = capsys.readouterr().err
    assert "calibrate     up to date" in said and "effect        up to date" not in said
    tight.export()
    assert fewer.scaled_layers(tight.recipe.ffn) == (4,)
    assert tight.bundle.manifest["stages"]["export"]["result"]["linear_layers"] == [4]
    tight.again().calibrate()
    assert "effect        up to date" in capsys.readouterr().err


def test_a_calibration_without_an_effect_is_measured_when_it_is_adopted(
    checkpoint: Path, pictures: Path, tmp_path: Path
) -> None:
    recipe = load_recipe("qwen25vl").model_copy(update={"ffn": ALL})
    one = Building.of(recipe, Bundle(tmp_path / "one"), checkpoint, images=pictures, samples=2)
    whole = one.calibrate()
    given = shutil.copy(tmp_path / "one" / "calibration.safetensors", tmp_path)
    two = Building.of(recipe, Bundle(tmp_path / "two"), checkpoint, images=pictures, samples=2, calibration=Path(given))
    assert Calibration.load(Path(given)).effect is None
    assert two.calibrate().effect == whole.effect

    never_asked = Building.of(recipe, Bundle(tmp_path / "three"), checkpoint, calibration=tmp_path / "two")
    assert never_asked.calibrate().effect == whole.effect


def test_a_calibration_that_does_not_say_is_refused(calibration: Calibration) -> None:
    with pytest.raises(CapaError, match=r"does not say what scales cost at eta 0.5 and 0.3 nats; run"):
        calibration.scaled_layers(FFN(eta=0.5, budget=0.3))
    assert calibration.scaled_layers(FFN(eta=0.96), eta=0.5) == calibration.linear_layers(0.5)


def test_a_changed_effect_is_refused(checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    recipe = load_recipe("qwen25vl").model_copy(update={"ffn": ALL})
    building = Building.of(recipe, Bundle(tmp_path / "out"), checkpoint, images=pictures, samples=1)
    building.calibrate()
    path = tmp_path / "out" / EFFECT
    path.write_text(path.read_text().replace('"samples":1', '"samples":2').replace('"samples": 1', '"samples": 2'))
    with pytest.raises(CapaError, match=EFFECT):
        Calibration.load(tmp_path / "out")


def test_an_effect_that_was_added_to_a_bundle_is_not_read(calibration: Calibration, tmp_path: Path) -> None:
    bundle = Bundle(tmp_path / "bundle")
    adopt_calibration(bundle, calibration)
    effect = harmless(calibration, ALL).effect
    assert effect is not None
    effect.save(bundle.folder / EFFECT)
    assert Calibration.load(bundle.folder).effect is None
    adopt_calibration(bundle, harmless(calibration, ALL))
    assert Calibration.load(bundle.folder).effect == effect
