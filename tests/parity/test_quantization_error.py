"""The quantization error is what two Hugging Face models say of each other, and nothing where nothing is rounded."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from capa_export.bundle.store import PARITY, REPORT, Bundle
from capa_export.config.recipe import Recipe, load_recipe
from capa_export.config.schedule import Prune, Stage
from capa_export.model.agreement import STEPS
from capa_export.model.eager_plan import EagerPlan, inputs_for
from capa_export.model.model import Model
from capa_export.model.prompt import Prompt, Turn
from capa_export.parity.oracle import Oracle
from capa_export.parity.quantization_error import measure_quantization
from capa_export.report.words import quantization_words
from tests.building import Building
from tests.conftest import noise
from tests.parity.builds import asked
from tests.quantizing import DECODER_LINEARS

TURNS = [[Turn("user", [noise(84, 112, seed), "what color is the star ?"])] for seed in range(3)]


def opened(folder: Path, quantize: str | None) -> Model:
    return Model(recipe=load_recipe("qwen25vl").with_options(quantize=quantize), checkpoint=str(folder))


def oracle_of(model: Model) -> Oracle:
    prune = Prune(schedule=(Stage(layer=2, ratio=0.75),))
    return Oracle(
        *(model.eager, model.family, model.prompter, prune, {}, "fp16", Path(), Path()),
        eos_token_ids=(),
    )


def test_it_is_the_kl_of_rounded_weights_along_the_answers_of_full_precision(checkpoint: Path) -> None:
    plain, rounded = opened(checkpoint, None), opened(checkpoint, "int4:32/rtn")
    oracle = oracle_of(rounded)
    found = measure_quantization(oracle, rounded, asked(TURNS), rounded.report)
    assert found is not None
    kls, hits = [], []
    for turns in TURNS:
        prompt, tokens = oracle.prompter.chat(turns), []
        for _ in range(STEPS):
            tokens.append(int(eager_logits(plain, prompt, tokens)[-1].argmax()))
        whole, own = (eager_logits(model, prompt, tokens[:-1]).double().log_softmax(-1) for model in (plain, rounded))
        kls.append(float((whole.exp() * (whole - own)).sum(-1).mean()))
        hits.append(float((own.argmax(-1) == torch.tensor(tokens)).float().mean()))
    assert found.kl == pytest.approx(sum(kls) / 3, rel=1e-3) and min(kls) > 1e-6
    assert found.kl_max == pytest.approx(max(kls), rel=1e-3)
    assert found.top1 == pytest.approx(sum(hits) / 3)
    assert (found.prompts, found.weights) == (3, "35 layers of INT4, rounded to nearest, groups of 32")


def eager_logits(model: Model, prompt: Prompt, tokens: Sequence[int]) -> torch.Tensor:
    """[S, V] of the Hugging Face model's own forward pass over the prompt's embeddings and the tokens."""
    inputs = inputs_for(EagerPlan(), model.family, model.eager, prompt)
    embed = model.eager.get_input_embeddings()
    embeds = torch.cat([inputs.embeds, embed(torch.tensor([list(tokens)], dtype=torch.long))], dim=1)
    steps = torch.arange(len(tokens)) + prompt.next_position
    positions = torch.cat([inputs.position_ids, steps.expand(*inputs.position_ids.shape[:-1], -1)], dim=-1)
    with torch.no_grad():
        found = model.eager.model.language_model(inputs_embeds=embeds, position_ids=positions)
        return model.eager.lm_head(found.last_hidden_state)[0, len(prompt.input_ids) - 1 :]


def test_weights_that_are_on_the_grid_cost_nothing(checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    rounded = dict(opened(checkpoint, "int4:32/rtn").eager.named_parameters())
    stored = load_file(folder / "model.safetensors")
    for name in [name for name in stored if DECODER_LINEARS.search(name) and "visual" not in name]:
        (weight,) = [w for other, w in rounded.items() if other.endswith(name.removeprefix("model."))]
        stored[name] = weight.detach().clone()
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    again = opened(folder, "int4:32/rtn")
    found = measure_quantization(oracle_of(again), again, asked(TURNS), again.report)
    assert found is not None
    assert found.kl == found.kl_max == pytest.approx(0, abs=1e-9) and found.top1 == 1


@pytest.mark.parametrize("quantize", ["int4:32/rtn", None])
def test_it_is_said_beside_the_other_errors(
    quantize: str | None, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data: dict[str, Any] = load_recipe("qwen25vl").model_dump() | {"quantize": quantize}
    data["parity"] |= {"prompts": 1, "steps": 2, "accuracy_samples": 1}
    noise(112, 84).save(tmp_path / "picture.png")
    building = Building.of(
        Recipe.model_validate(data | {"prune": {"schedule": [{"layer": 2, "ratio": 0.75}]}}),
        *(Bundle(tmp_path / "out"), checkpoint),
        images=tmp_path / "picture.png",
        ffn=False,
    )
    building.export()
    found = building.validate().quantization_error
    stored = json.loads((tmp_path / "out" / PARITY).read_text())["quantization_error"]
    page = (tmp_path / "out" / REPORT).read_text()
    assert ("Quantization error" in page) is (quantize is not None)
    if quantize is None:
        assert found is None and stored is None
    else:
        assert found is not None and stored["kl"] == found.kl
        assert quantization_words(found).startswith("Quantization error on 1 prompts, eager FP32, nothing removed: KL")
