"""A model whose weights stream computes what it computes in memory, bit for bit, and holds one part at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from capa_export.config.schedule import Prune
from capa_export.model.checkpoint import open_checkpoint
from capa_export.model.eager import Eager
from capa_export.model.eager_plan import EagerInputs, EagerPlan, inputs_for
from capa_export.model.families import load_family
from capa_export.model.lockstep import run_pass, together
from capa_export.model.low_precision import lowered
from capa_export.model.prompt import Prompt, Prompter
from capa_export.model.source import Source
from capa_export.model.streamed import StoredWeights, hollow_model
from capa_export.parity.oracle import Oracle
from capa_export.parity.records import tracing
from capa_export.parity.trace import Trace, sampled_rows
from capa_export.parity.validate import dense_logits
from tests.conftest import noise
from tests.models import FAMILIES

PRUNE = Prune.model_validate({"schedule": [{"layer": 1, "ratio": 0.5}]})
STEPS = 4


@pytest.fixture(params=FAMILIES, scope="module")
def subjects(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Oracle, Oracle]:
    """In memory, and streamed from the same files."""
    small = FAMILIES[request.param]
    folder = small.save_model(tmp_path_factory.mktemp("checkpoint"), small.random_model())
    source = Source.of(open_checkpoint(str(folder)), load_family(request.param))
    model = getattr(transformers, source.family.ARCHITECTURE).from_pretrained(folder, dtype=torch.float32).eval()
    for parameter in model.parameters():
        # Mapped from the file they lie at odd addresses, from which some kernels sum in another order.
        parameter.data = parameter.data.clone()
    weights = StoredWeights(source)
    prompter = Prompter(folder, folder, source.family, source.dims)
    alpha = np.linspace(0.5, 1.5, source.dims.decoder.hidden_size, dtype=np.float32)
    make = partial(
        Oracle,
        family=source.family,
        prompter=prompter,
        prune=PRUNE,
        scales={2: alpha},
        precision="fp16",
        onnx=folder,
        fp32_onnx=folder,
        eos_token_ids=(),
    )
    return make(model), make(hollow_model(source, weights), weights=weights)


def prompts_of(oracle: Oracle) -> list[Prompt]:
    pictures = [noise(140, 112, 1), noise(112, 84, 2)]
    return [oracle.prompter("what color is the star ?", pictures[:count]) for count in (1, 2, 0)]


def traced(oracle: Oracle, eager: Eager, tokens: list[int]) -> list[tuple[Trace, list[int]]]:
    passes = [
        tracing(oracle, eager, prompt, oracle.plan(prompt), STEPS, tokens, sampled_rows(len(prompt.input_ids)))
        for prompt in prompts_of(oracle)
    ]
    return eager.run(passes)


def assert_equal(found: list[tuple[Trace, list[int]]], wanted: list[tuple[Trace, list[int]]]) -> None:
    for (own, fed), (other, wanted_fed) in zip(found, wanted, strict=True):
        assert fed == wanted_fed
        for name in ("logits", "hidden", "features"):
            np.testing.assert_array_equal(getattr(own, name), getattr(other, name), strict=True)
        for name in ("kept", "scores"):
            for a, b in zip(getattr(own, name), getattr(other, name), strict=True):
                np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("tokens", [[], [5, 6], [5, 6, 7]])
def test_equals_in_memory(subjects: tuple[Oracle, Oracle], tokens: list[int]) -> None:
    resident, streamed = subjects
    assert_equal(traced(streamed, streamed.eager, tokens), traced(resident, resident.eager, tokens))


@pytest.mark.parametrize("fp32_layers", [(), ("residual", "1.mlp", "visual.residual")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_equals_in_memory_in_half_precision(
    subjects: tuple[Oracle, Oracle], dtype: torch.dtype, fp32_layers: tuple[str, ...]
) -> None:
    found = [
        traced(oracle, Eager(lowered(oracle.model, dtype, fp32_layers), oracle.weights), [5, 6, 7])
        for oracle in subjects
    ]
    assert_equal(found[1], found[0])


def test_known_tokens_that_follow_the_prompt_equal_those_fed_one_after_the_other(
    subjects: tuple[Oracle, Oracle],
) -> None:
    oracle = subjects[0]
    trace, _ = traced(oracle, oracle.eager, [5, 6, 7])[0]
    prompt = prompts_of(oracle)[0]
    plan = oracle.plan(prompt)
    inputs = inputs_for(plan, oracle.family, oracle.model, prompt)
    run = oracle.eager.prefill(inputs, torch.from_numpy(prompt.is_visual), plan)
    logits = [run.logits, *(oracle.eager.step(run, token, run.next_position + i) for i, token in enumerate([5, 6, 7]))]
    np.testing.assert_array_equal(trace.logits, torch.stack(logits).numpy())


def test_the_models_own_forward_pass_streams_too(subjects: tuple[Oracle, Oracle]) -> None:
    prompt = prompts_of(subjects[0])[0]
    resident, streamed = (dense_logits(oracle, prompt, [5, 6, 7]) for oracle in subjects)
    np.testing.assert_array_equal(streamed, resident)
    # What it is in its first row: the whole model's answer, without a loop of ours.
    model = subjects[0].model
    embeds, position_ids = EagerInputs.of(subjects[0].family.eager_inputs(model, prompt))[:2]
    plain = subjects[0].eager.prefill(
        EagerInputs.of(subjects[0].family.eager_inputs(model, prompt)), torch.from_numpy(prompt.is_visual), EagerPlan()
    )
    assert embeds.shape[1] == position_ids.shape[-1]
    np.testing.assert_allclose(resident[0], plain.logits.numpy(), atol=2e-5)


def test_nothing_stays_in_memory(subjects: tuple[Oracle, Oracle], monkeypatch: pytest.MonkeyPatch) -> None:
    resident, streamed = subjects
    text = resident.model.model.language_model
    layers = [in_memory(layer) for layer in text.layers]
    head = in_memory(resident.model.lm_head)
    tower = in_memory(resident.model) - sum(layers) - head - in_memory(text.embed_tokens)
    idle = in_memory(streamed.model)
    held: list[int] = []
    load = StoredWeights.load

    def weigh(*given: Any) -> None:
        load(*given)
        held.append(in_memory(streamed.model) - idle)

    monkeypatch.setattr(StoredWeights, "load", weigh)
    traced(streamed, streamed.eager, [5, 6, 7])
    assert max(held) <= max(*layers, head, tower) and in_memory(streamed.model) == idle
    # Three prompts, each with three tokens behind it: layers and head were loaded once.
    assert held[-len(layers) - 2 :] == [*layers, 0, head]
    assert min(held[: -len(layers) - 2]) > 0


def test_no_graph_of_gradients_keeps_weights_alive(subjects: tuple[Oracle, Oracle]) -> None:
    """What a pass leaves would hold the weights it was computed with."""
    oracle = subjects[1]
    for prompt in prompts_of(oracle):
        plan = oracle.plan(prompt)

        def work(prompt: Prompt = prompt, plan: EagerPlan = plan) -> Any:
            yield "tower"
            return inputs_for(plan, oracle.family, oracle.model, prompt)

        (inputs,) = oracle.eager.run([work()])
        assert not inputs.embeds.requires_grad
        run = oracle.eager.prefill(inputs, torch.from_numpy(prompt.is_visual), plan)
        assert not run.logits.requires_grad and not run.cache.layers[0].keys.requires_grad


def in_memory(module: torch.nn.Module) -> int:
    """Elements of matrices; norms and position tables are ones and zeros until they are loaded, and small."""
    return sum(weights.numel() for weights in module.parameters() if weights.ndim > 1 and not weights.is_meta)


def test_passes_go_on_together_in_their_order() -> None:
    seen: list[tuple[str, Any]] = []

    def work(name: str, parts: list[Any]) -> Any:
        for part in parts:
            yield part
            seen.append((name, part))
        return name

    held: list[Any] = []

    @contextmanager
    def holding(part: Any) -> Iterator[None]:
        held.append(part)
        yield

    passes = [work("a", ["tower", 0, 1]), work("b", [0, 1, "head"]), work("c", [])]
    assert run_pass(together(passes), holding) == ["a", "b", "c"]
    assert held == ["tower", 0, 1, "head"]
    assert seen == [("a", "tower"), ("a", 0), ("b", 0), ("a", 1), ("b", 1), ("b", "head")]


def test_a_pass_that_fails_lets_go_of_what_it_held() -> None:
    held: list[Any] = []

    def work() -> Any:
        yield 0
        raise ValueError("no")

    @contextmanager
    def holding(part: Any) -> Iterator[None]:
        held.append(part)
        try:
            yield
        finally:
            held.remove(part)

    with pytest.raises(ValueError, match="no"):
        run_pass(together([work()]), holding)
    assert not held
