"""Agreement along dense's own answer, worked out by hand on the small random model."""

from pathlib import Path
from typing import Any

import pytest
import torch

from capa_export.calibrate.sums import Calibration
from capa_export.config.recipe import Recipe
from capa_export.config.schedule import parse_method
from capa_export.data.samples import Sample
from capa_export.model.agreement import STEPS, DenseAnswer
from capa_export.model.eager import Eager
from capa_export.model.eager_plan import EagerInputs, EagerPlan
from capa_export.model.families import qwen25vl
from capa_export.model.model import Model
from capa_export.model.prompt import Turn
from capa_export.selectors.selector import selectors
from capa_export.study.tune.agreement import Judge
from tests.conftest import noise


@pytest.fixture(scope="module")
def judge(recipe: Recipe, calibration: Calibration, checkpoint: Path) -> Judge:
    return Judge(Model(recipe=recipe, checkpoint=str(checkpoint)), calibration, selectors())


@pytest.fixture(scope="module")
def opened(judge: Judge) -> DenseAnswer:
    return judge.run_dense(Sample([Turn("user", [noise(224, 168), "what is it ?"])]))


def test_dense_answers_greedily(opened: DenseAnswer, model: Any) -> None:
    """As Hugging Face's own forward pass on the prompt and what was said so far."""
    embeds, positions = EagerInputs.of(qwen25vl.eager_inputs(model, opened.prompt))[:2]
    said = torch.tensor([list(opened.tokens[:-1])])
    next_positions = opened.prompt.next_position + torch.arange(said.shape[1]).expand(3, 1, -1)
    with torch.no_grad():
        logits = model(
            inputs_embeds=torch.cat([embeds, model.model.language_model.embed_tokens(said)], dim=1),
            position_ids=torch.cat([positions, next_positions], dim=-1),
        ).logits[0, embeds.shape[1] - 1 :]
    assert torch.allclose(logits, torch.stack(list(opened.logits)), atol=1e-4)
    assert logits.argmax(-1).tolist() == list(opened.tokens)
    assert 1 <= len(opened.tokens) <= STEPS


@pytest.mark.parametrize("name", selectors())
def test_every_selector_that_drops_nothing_is_dense(judge: Judge, opened: DenseAnswer, name: str) -> None:
    text = f"{name}:0/full" if judge.every.selectors[selectors().index(name)].place == "input" else f"{name}@2:0/full"
    kl, top1 = judge.agreement(parse_method(text), opened)
    assert kl == pytest.approx(0, abs=1e-9)
    assert top1 == 1


def test_pruning_and_scales_are_counted_at_every_step(judge: Judge, opened: DenseAnswer, model: Any) -> None:
    found = judge.agreement(parse_method("capa@1:0.75/eta=0.93"), opened)
    eager = Eager(model)
    scales = {layer: torch.from_numpy(judge.calibration.layers[layer].alpha).float() for layer in (3, 4)}
    plan = EagerPlan(keep={1: 12}, scales=scales, min_keep_per_image=1)
    run = eager.prefill(opened.inputs, torch.from_numpy(opened.prompt.is_visual), plan)
    logits = [run.logits]
    for at, token in enumerate(opened.tokens[:-1]):
        logits.append(eager.step(run, token, opened.prompt.next_position + at))
    pairs = [
        (wanted.double().log_softmax(-1), got.double().log_softmax(-1))
        for wanted, got in zip(opened.logits, logits, strict=True)
    ]
    assert found.kl == pytest.approx(sum(float((p.exp() * (p - q)).sum()) for p, q in pairs) / len(pairs))
    assert found.kl > 1e-3
    assert found.top1 == sum(bool(p.argmax() == q.argmax()) for p, q in pairs) / len(pairs)
