"""The method's error is measured on the answers, and random pruning at the same k is what CAPA has to beat."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import ref

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from benchmarks.tiny.dataset import write_dataset
from capa_export.base.progress import silent
from capa_export.base.toml import shipped
from capa_export.config.recipe import load_recipe
from capa_export.config.schedule import Prune, Stage
from capa_export.data.samples import Conversation, Samples, samples_from
from capa_export.data.scenes import samples
from capa_export.model.checkpoint import open_checkpoint
from capa_export.model.eager import Eager
from capa_export.model.eager_plan import EagerInputs, EagerPlan
from capa_export.model.families import qwen25vl
from capa_export.model.generation import eos_token_ids
from capa_export.model.prompt import Prompter
from capa_export.model.source import Source
from capa_export.parity.method import measure_method
from capa_export.parity.oracle import Oracle
from capa_export.report.pages import Example
from capa_export.report.schema import Method, MethodError
from capa_export.selectors import capa

SCALES = {1: np.linspace(0.5, 1.5, 64), 3: np.linspace(1.5, 0.6, 64)}


def pruned(ratio: float, layer: int = 2) -> Prune:
    return Prune(schedule=(Stage(layer=layer, ratio=ratio),))


def scenes(count: int) -> Samples:
    return Samples(count=count, name="scenes", has_answers=True, split="held_out")


@pytest.fixture(scope="module")
def oracle(model: Any, prompter: Prompter, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    """Of random weights, which answer nothing right."""
    nowhere = tmp_path_factory.mktemp("nowhere")
    return Oracle(
        model=model,
        family=qwen25vl,
        prompter=prompter,
        prune=pruned(0.75),
        scales=SCALES,
        precision="fp16",
        onnx=nowhere,
        fp32_onnx=nowhere,
        eos_token_ids=(2,),
    )


@pytest.fixture(scope="module")
def trained(oracle: Oracle) -> Oracle:
    folder = shipped("graphs") / "checkpoints" / "tiny-qwen25vl"
    source = Source.of(open_checkpoint(str(folder)), qwen25vl)
    return replace(
        oracle,
        model=Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval(),
        prompter=Prompter(folder, folder, qwen25vl, source.dims),
        scales={},
        eos_token_ids=eos_token_ids(folder),
    )


def asked(
    oracle: Oracle, questions: Samples, *, seed: int = 0, steps: int = 4
) -> tuple[MethodError, dict[str, Method], list[Example]]:
    found, examples = measure_method(oracle, questions, seed, steps, silent)
    json.dumps(found.model_dump(mode="json"), allow_nan=False)
    return found, {method.name: method for method in found.methods}, examples


def test_capa_beats_random_pruning_on_the_trained_model(trained: Oracle) -> None:
    found, methods, examples = asked(trained, scenes(16))
    assert found.questions == 16
    assert found.beats_random
    assert found.kl_gain is not None and found.accuracy_gain is not None
    assert 0 < found.kl_gain.low < found.kl_gain.value < found.kl_gain.high
    capa, random = methods["capa"], methods["random"]
    assert capa.kl is not None and random.kl is not None
    assert found.kl_gain.value == pytest.approx(random.kl - capa.kl)
    assert methods["dense"].accuracy is not None and methods["dense"].accuracy.value > 0.9
    assert capa.accuracy is not None and random.accuracy is not None
    assert found.accuracy_gain.value == pytest.approx(capa.accuracy.value - random.accuracy.value)
    assert any(words.startswith("CAPA beats random pruning at the same k: KL from dense") for words in found.words)
    assert len(examples) == 4
    assert [example.dense for example in examples] == [example.expected for example in examples]
    assert all(len(example.kept[0].kept) == 16 for example in examples)


def test_pruning_that_keeps_the_least_is_said_not_to_beat_random(
    trained: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = capa.reference
    worst = replace(capa.SELECTOR, reference=lambda view: 1 / (1e-9 + right(view)))
    monkeypatch.setattr(capa, "SELECTOR", worst)
    found, methods, _ = asked(replace(trained, prune=pruned(0.5)), scenes(12))
    assert found.beats_random is False
    assert found.kl_gain is not None and found.kl_gain.low <= 0
    assert methods["capa"].kl is not None and methods["random"].kl is not None
    sentence = next(words for words in found.words if words.startswith("CAPA does not beat random pruning"))
    assert f"{methods['capa'].kl:.3g} against {methods['random'].kl:.3g}" in sentence
    assert sentence.endswith(", which is not above 0.")


def test_a_gain_on_the_mean_that_chance_explains_beats_nothing(trained: Oracle) -> None:
    """Of six questions one speaks against CAPA: its mean is far better, and no test is sure of it."""
    found, methods, _ = asked(trained, scenes(6))
    assert found.kl_gain is not None and methods["capa"].kl is not None and methods["random"].kl is not None
    assert found.kl_gain.low <= 0 < found.kl_gain.value and methods["capa"].kl < methods["random"].kl
    assert found.beats_random is False
    assert any(words.startswith("CAPA does not beat random pruning") for words in found.words)


def test_nothing_removed_is_dense(oracle: Oracle) -> None:
    found, methods, _ = asked(replace(oracle, prune=pruned(0), scales={}), scenes(6))
    for method in (methods["capa"], methods["random"]):
        assert (method.kl, method.top5, method.diverges_at) == (0, 1, None)
        assert method.top1 is not None and method.same_answer is not None
        assert method.top1.value == method.same_answer.value == 1
    assert found.kl_gain is not None
    assert (found.kl_gain.low, found.kl_gain.high) == (0, 0)
    assert found.beats_random is None
    assert found.words[0].startswith("No visual token was removed")
    found, methods, _ = asked(replace(oracle, prune=pruned(0)), scenes(6))
    assert methods["capa"].kl == methods["random"].kl != 0
    assert found.words[0].startswith("No visual token was removed")


@pytest.mark.parametrize(
    ("answering", "ratio", "apart_at"),
    [("trained", 0.9, {None, 0}), pytest.param("oracle", 0.75, {0, 1}, marks=pytest.mark.exhaustive)],
)
def test_figures_are_those_of_the_answers(
    answering: str, ratio: float, apart_at: set[int | None], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Counted again from the eager model itself: on numbers, of which either digit may be another."""
    oracle = replace(request.getfixturevalue(answering), prune=pruned(ratio, layer=0))
    numbers = write_dataset(tmp_path, samples(16, seed=0, kinds=["number"]))
    questions, steps = samples_from(numbers, load_recipe("tiny-qwen25vl"), 16, split="held_out"), 4
    eager = Eager(oracle.model)
    first = {name: [] for name in ("dense", "capa")}
    answers = {name: [] for name in ("dense", "capa")}
    for sample in questions:
        prompt = oracle.prompter.chat(sample.turns)
        inputs = EagerInputs.of(oracle.family.eager_inputs(oracle.model, prompt))
        for name, plan in (("dense", EagerPlan()), ("capa", oracle.plan(prompt))):
            run = eager.prefill(inputs, torch.from_numpy(prompt.is_visual), plan)
            logits = [run.logits.numpy()]
            for step in range(steps - 1):
                logits.append(eager.step(run, int(logits[-1].argmax()), run.next_position + step).numpy())
            first[name].append(logits[0])
            answers[name].append([int(row.argmax()) for row in logits])
    (eos,) = oracle.eos_token_ids
    ended = {name: [row[: row.index(eos)] if eos in row else row for row in rows] for name, rows in answers.items()}
    _, methods, _ = asked(oracle, questions, steps=steps)
    capa = methods["capa"]
    pairs = list(zip(ended["dense"], ended["capa"], strict=True))
    common = [next((at for at in range(steps) if a[at : at + 1] != b[at : at + 1]), None) for a, b in pairs]
    known = [at for at in common if at is not None]
    assert capa.same_answer is not None and capa.top1 is not None
    assert apart_at <= set(common)
    assert capa.same_answer.value == common.count(None) / 16
    assert capa.diverges_at == pytest.approx(np.mean(known))
    assert capa.top1.value == np.mean([a[0] == b[0] for a, b in zip(answers["dense"], answers["capa"], strict=True)])
    top5 = [[set(np.argsort(row)[-5:].tolist()) for row in first[name]] for name in ("dense", "capa")]
    assert capa.top5 == pytest.approx(np.mean([len(a & b) / 5 for a, b in zip(*top5, strict=True)]))
    p, q = (np.exp(np.array(first[name], np.float64)) for name in ("dense", "capa"))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    assert capa.kl == pytest.approx((p * np.log(p / q)).sum(1).mean())


def test_only_the_random_baseline_depends_on_the_seed(oracle: Oracle) -> None:
    found, methods, _ = asked(oracle, scenes(6), steps=1)
    again, same, _ = asked(oracle, scenes(6), steps=1)
    _, other, _ = asked(oracle, scenes(6), steps=1, seed=1)
    assert found == again
    assert methods == same
    assert other["capa"] == methods["capa"]
    assert other["random"] != methods["random"]
    assert found.words[-1].startswith("The dense model answers nothing right")


def test_a_few_questions_prove_nothing(oracle: Oracle) -> None:
    found, _, _ = asked(oracle, scenes(5), steps=1)
    assert found.beats_random is None
    assert any("5 questions are too few" in words for words in found.words)
    found, examples = measure_method(oracle, scenes(0), 0, 1, silent)
    assert (found, examples) == (
        MethodError(questions=0, words=("No question was asked: the method's error was not measured.",)),
        [],
    )


def test_the_users_own_answers_are_counted(trained: Oracle, tmp_path: Path) -> None:
    lines: list[Conversation] = []
    for index, scene in enumerate(scenes(6)):
        scene.image.save(tmp_path / f"{index}.png")
        content = [{"type": "image", "image": f"{index}.png"}, {"type": "text", "text": scene.question}]
        messages = [{"role": "user", "content": content}]
        answer = scene.answer if index else "something else"
        lines.append(Conversation.model_validate({"messages": messages, "answer": answer}))
    own = Samples(count=6, name="own", has_answers=True, conversations=tuple(lines), folder=tmp_path)
    _, scene_figures, _ = asked(trained, scenes(6))
    found, methods, examples = asked(trained, own)
    of_scenes, accuracy = scene_figures["dense"].accuracy, methods["dense"].accuracy
    assert of_scenes is not None and accuracy is not None
    assert accuracy.value == pytest.approx(of_scenes.value - 1 / 6)
    assert examples[0].expected == "something else"
    unknown = replace(own, has_answers=False)
    found, methods, _ = asked(trained, unknown)
    assert found.accuracy_gain is None and methods["capa"].accuracy is None
    assert "The answers are not known, so there is no accuracy." in found.words


def test_logits_that_are_not_finite_are_said_to_be(oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    right: Any = Eager.prefilling

    def overflowing(eager: Eager, inputs: Any, is_visual: Any, plan: EagerPlan, *rest: Any) -> Any:
        run = yield from right(eager, inputs, is_visual, plan, *rest)
        return replace(run, logits=run.logits * np.nan) if plan.keep else run

    monkeypatch.setattr(Eager, "prefilling", overflowing)
    found, methods, _ = asked(oracle, scenes(6), steps=1)
    assert (found.beats_random, found.kl_gain, methods["capa"].kl) == (False, None, None)
    assert "CAPA does not beat random pruning at the same k: the KL from dense is not finite." in found.words


def test_memory_does_not_grow_with_the_questions(oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two questions' prompts and caches at most are alive: the one that is asked, and the last one's."""
    prefilling, chat = Eager.prefilling, Prompter.chat
    seen: dict[str, list[ref[Any]]] = {"prefills": [], "prompts": []}
    alive = {"prefills": 0, "prompts": 0}

    def watched(what: str, made: Any) -> Any:
        seen[what].append(ref(made))
        alive[what] = max(alive[what], sum(one() is not None for one in seen[what]))
        return made

    def watched_prefill(*given: Any) -> Any:
        return watched("prefills", (yield from prefilling(*given)))

    monkeypatch.setattr(Eager, "prefilling", watched_prefill)
    monkeypatch.setattr(Prompter, "chat", lambda *given: watched("prompts", chat(*given)))
    asked(oracle, scenes(12), steps=2)
    assert [len(made) for made in seen.values()] == [36, 12]
    assert alive["prefills"] <= 6
    assert alive["prompts"] <= 2
