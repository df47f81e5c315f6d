"""The fewest layers stay plain, the worst first; what each number of them costs is what two eager models say."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from capa_export.base.statistics import kl_divergence
from capa_export.calibrate.plain_layers import choose_plain
from capa_export.config.recipe import load_recipe
from capa_export.data.samples import Samples, samples_from
from capa_export.model.eager import Eager
from capa_export.model.eager_plan import EagerInputs, EagerPlan
from capa_export.model.model import Model
from capa_export.model.quantized.choice import WeightChoice
from tests.conftest import noise

ERRORS = (0.1, 0.5, 0.2, 0.4, 0.3)
WORST_FIRST = (1, 3, 4, 2, 0)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    folder = tmp_path_factory.mktemp("pictures")
    for seed in range(2):
        noise(84, 112, seed).save(folder / f"{seed}.png")
    return samples_from(folder, load_recipe("qwen25vl"), 2, split="train")


def model_of(checkpoint: Path, budget: float, plain: tuple[int, ...] = ()) -> Model:
    recipe = load_recipe("qwen25vl").with_options(quantize="int4:32/rtn", auto_precision=True)
    recipe = recipe.model_copy(update={"quantization_budget": budget})
    return Model(recipe=recipe, checkpoint=str(checkpoint), choice=WeightChoice(plain=plain))


def first_token_kl(checkpoint: Path, samples: Samples, plain: tuple[int, ...]) -> float:
    """Mean KL of the first answer token; the stop set makes it the only one."""
    rounded = model_of(checkpoint, 0, tuple(sorted(plain)))
    whole = replace(rounded, recipe=rounded.recipe.model_copy(update={"quantize": None}))
    total = 0.0
    for sample in samples:
        prompt = whole.prompter.chat(sample.turns)
        is_visual = torch.from_numpy(prompt.is_visual)
        logits = [
            Eager(model.eager)
            .prefill(EagerInputs.of(model.family.eager_inputs(model.eager, prompt)), is_visual, EagerPlan())
            .logits
            for model in (whole, rounded)
        ]
        total += kl_divergence(*logits)
    return total / samples.count


def test_every_number_that_is_tried_has_its_kl_and_the_fewest_within_the_budget_is_taken(
    checkpoint: Path, samples: Samples
) -> None:
    stop = range(1000)
    kl = [first_token_kl(checkpoint, samples, WORST_FIRST[:count]) for count in range(6)]
    assert kl[5] == pytest.approx(0, abs=1e-9) and min(kl[:5]) > 1e-7
    for budget in (1.01 * kl[0], 0.5 * (kl[2] + kl[3]), 0.0):
        model = model_of(checkpoint, budget)
        found = choose_plain(model, WeightChoice(errors=ERRORS), samples, stop=stop)
        assert found.tried[0][0] == 0
        for count, measured in found.tried:
            assert measured == pytest.approx(kl[count], rel=1e-3)
        count = len(found.plain)
        assert found.plain == tuple(sorted(WORST_FIRST[:count]))
        # The budget holds for it, and not for the next smaller number, which was tried.
        assert kl[count] <= budget or count == 5
        assert count == 0 or dict(found.tried)[count - 1] > budget
