"""The eager reference is the Hugging Face model, and CAPA on it is what the paper writes."""

from typing import Any

import pytest
import torch

from capa_export.model.eager import Eager, EagerPrefill, _cache_argument
from capa_export.model.eager_plan import EagerInputs, EagerPlan
from capa_export.model.families import qwen25vl
from capa_export.model.prompt import Prompt, Prompter
from tests.conftest import noise


@pytest.fixture(scope="module")
def prompt(prompter: Prompter) -> Prompt:
    return prompter("what color is the star ?", [noise(224, 140)])


def prefill(model: Any, prompt: Prompt, plan: EagerPlan) -> EagerPrefill:
    embeds, position_ids = qwen25vl.eager_inputs(model, prompt)
    return Eager(model).prefill(EagerInputs(embeds, position_ids), torch.from_numpy(prompt.is_visual), plan)


def test_no_plan_is_the_model_itself(model: Any, prompt: Prompt) -> None:
    embeds, position_ids = qwen25vl.eager_inputs(model, prompt)
    with torch.no_grad():
        expected = model(inputs_embeds=embeds, position_ids=position_ids).logits[0, -1]
    torch.testing.assert_close(prefill(model, prompt, EagerPlan()).logits, expected, atol=1e-5, rtol=0)


def test_dense_answer_equals_generate(model: Any, prompt: Prompt) -> None:
    ids = torch.from_numpy(prompt.input_ids)[None]
    patches = torch.from_numpy(prompt.pictures[0].patches.reshape(-1, 1176))
    grid = torch.tensor([[1, 10, 16]])
    kinds = torch.from_numpy(prompt.is_visual)[None].int()
    generated = model.generate(
        input_ids=ids,
        pixel_values=patches,
        image_grid_thw=grid,
        mm_token_type_ids=kinds,
        max_new_tokens=8,
        min_new_tokens=8,
        do_sample=False,
    )
    run = prefill(model, prompt, EagerPlan())
    eos, tokens, logits = model.generation_config.eos_token_id, [], run.logits
    for step in range(8):
        logits[eos] = -torch.inf  # min_new_tokens forbids it
        tokens.append(int(logits.argmax()))
        logits = Eager(model).step(run, tokens[-1], prompt.next_position + step)
    assert generated[0, ids.shape[1] :].tolist() == tokens


def test_attention_that_renamed_its_cache_is_given_it(
    model: Any, prompt: Prompt, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """As from transformers 5.24 on, where the old name is taken with a warning and is to be gone in 5.40."""
    plan = EagerPlan(keep={2: 3})
    expected = prefill(model, prompt, plan)
    attention = type(model.model.language_model.layers[0].self_attn)
    forward, name = attention.forward, _cache_argument(attention)

    def renamed(self: Any, hidden_states: torch.Tensor, cache: Any = None, **others: Any) -> Any:
        return forward(self, hidden_states, **{name: cache}, **others)

    monkeypatch.setattr(attention, "forward", renamed)
    _cache_argument.cache_clear()
    found = prefill(model, prompt, plan)
    step = Eager(model).step(found, 5, prompt.next_position)
    monkeypatch.undo()
    _cache_argument.cache_clear()
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(step, Eager(model).step(expected, 5, prompt.next_position))
    assert not [warning for warning in recwarn if "past_key_values" in str(warning.message)]


def test_score_is_the_norm_of_what_the_layer_writes(model: Any, prompt: Prompt) -> None:
    """Rebuilt from the attention output: leaving one token's value out changes it by that token's contribution."""
    scores = prefill(model, prompt, EagerPlan(keep={2: 3})).scores[2]
    attention = model.model.language_model.layers[2].self_attn
    seen: dict[str, Any] = {}
    handle = attention.register_forward_hook(
        lambda module, args, kwargs, output: seen.update(kwargs=kwargs), with_kwargs=True
    )
    hidden: dict[str, torch.Tensor] = {}
    before = model.model.language_model.layers[2].input_layernorm.register_forward_hook(
        lambda module, args, output: hidden.update(normed=output)
    )
    embeds, position_ids = qwen25vl.eager_inputs(model, prompt)
    with torch.no_grad():
        model.model.language_model(inputs_embeds=embeds, position_ids=position_ids, use_cache=False)
    handle.remove()
    before.remove()
    normed, rotary = hidden["normed"], seen["kwargs"]["position_embeddings"]
    with torch.no_grad():
        whole, _ = attention(normed, attention_mask=None, position_embeddings=rotary)
        for token in (9, 20, 35):
            project = attention.v_proj.forward

            def without(x: torch.Tensor, token: int = token, project: Any = project) -> torch.Tensor:
                value = project(x)
                value[:, token] = 0
                return value

            attention.v_proj.forward = without
            less, _ = attention(normed, attention_mask=None, position_embeddings=rotary)
            attention.v_proj.forward = project
            torch.testing.assert_close(scores[token], (whole - less)[0, -1].norm(), rtol=1e-3, atol=1e-6)


def test_text_survives_and_the_best_visual_tokens_do(model: Any, prompt: Prompt) -> None:
    run = prefill(model, prompt, EagerPlan(keep={2: 5}))
    kept = run.kept[2]
    visual = torch.from_numpy(prompt.is_visual)
    assert kept.tolist() == sorted(kept.tolist())
    assert set((~visual).nonzero()[:, 0].tolist()) <= set(kept.tolist())
    best = run.scores[2].masked_fill(~visual, -1).topk(5).indices
    assert set(best.tolist()) == set(kept[visual[kept]].tolist())


def test_forced_and_random_kept_sets(model: Any, prompt: Prompt) -> None:
    chosen = prefill(model, prompt, EagerPlan(keep={2: 5})).kept[2]
    forced = prefill(model, prompt, EagerPlan(keep={2: 5}, forced={2: chosen}))
    assert forced.kept[2].tolist() == chosen.tolist()
    first, again, other = (
        prefill(model, prompt, EagerPlan(keep={2: 5}, random_seed=seed)).kept[2] for seed in (1, 1, 2)
    )
    assert first.tolist() == again.tolist()
    assert first.tolist() != other.tolist()
    assert len(first) == len(chosen)


def test_scale_stands_for_the_ffn_of_visual_tokens_only(model: Any, prompt: Prompt) -> None:
    dense = prefill(model, prompt, EagerPlan())
    scaled = prefill(model, prompt, EagerPlan(scales={0: torch.full((64,), 2.0)}))
    visual = torch.from_numpy(prompt.is_visual)
    change = (dense.cache.layers[1].keys - scaled.cache.layers[1].keys)[0].abs().amax((0, 2))
    assert (change[visual] > 0).all()
    before = visual.nonzero()[0, 0]
    assert (change[:before] == 0).all()
