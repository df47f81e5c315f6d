"""Generation on ONNX Runtime, with the trained bed's weights."""

from pathlib import Path

import numpy as np
import pytest

from capa_export.config.recipe import load_recipe
from capa_export.data.scenes import samples
from capa_export.export.graphs import write_onnx
from capa_export.model.checkpoint import open_checkpoint
from capa_export.model.families import qwen25vl
from capa_export.model.prompt import Prompt, Prompter
from capa_export.model.source import Source
from capa_export.run import providers
from capa_export.run.decoding import greedy
from capa_export.run.onnx import OnnxModel

LIMIT = 6


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[OnnxModel, list[Prompt]]:
    """The tiny model in FP32, and eight questions about pictures of different sizes."""
    folder = Path(load_recipe("tiny-qwen25vl").checkpoint)
    source = Source.of(open_checkpoint(str(folder)), qwen25vl)
    out = tmp_path_factory.mktemp("onnx")
    write_onnx(source, "fp32", out, prune_layers=(2,), scales={})
    prompter = Prompter(folder, folder, qwen25vl, source.dims)
    drawn = [sample for cells in ((8, 8), (6, 9)) for sample in samples(4, seed=3, cells=cells)]
    return OnnxModel(out, threads=1), [prompter(sample.question, [sample.image]) for sample in drawn]


def answers(onnx: OnnxModel, prompts: list[Prompt], stop: list[int]) -> list[list[int]]:
    runs = [onnx.prefill(prompt, [-(-prompt.num_visual // 4)]) for prompt in prompts]
    steps = list(greedy(onnx, prompts, runs, stop, LIMIT))
    return [[token for token in answer if token is not None] for answer in zip(*steps, strict=True)]


def test_a_batch_generates_what_each_prompt_does_alone(trained: tuple[OnnxModel, list[Prompt]]) -> None:
    onnx, prompts = trained
    alone = [answers(onnx, [prompt], [])[0] for prompt in prompts]
    assert len({tuple(answer) for answer in alone}) > 2
    assert answers(onnx, prompts, []) == alone


@pytest.mark.parametrize(("word", "rounds"), [("int8", True), ("int4:32/rtn", True), ("fp8", False)])
def test_what_meets_whole_numbers_is_rounded_and_only_where_it_may_be(
    trained: tuple[OnnxModel, list[Prompt]], tmp_path: Path, word: str, *, rounds: bool
) -> None:
    """By less than a scale for 32 numbers of 8 bits does, which is half a step of 1/127 of the largest each.

    What was dequantized as the file was opened may be summed in another order than what is at every run.
    """
    prompt = trained[1][0]
    source = Source.of(open_checkpoint(load_recipe("tiny-qwen25vl").checkpoint), qwen25vl, word)
    write_onnx(source, "fp32", tmp_path, prune_layers=(2,), scales={})
    keep = [prompt.num_visual]
    exact, usual = (OnnxModel(tmp_path, threads=1, exact=one).prefill(prompt, keep).logits for one in (True, False))
    error = np.linalg.norm(usual - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < 0.02 if rounds else error < 1e-6, error


def test_caches_that_stay_on_the_device_give_the_same_answers(
    trained: tuple[OnnxModel, list[Prompt]], monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx, prompts = trained
    expected = answers(onnx, prompts, [])
    monkeypatch.setattr(onnx, "binds", True)
    run = onnx.prefill(prompts[0], [4])
    assert {type(held).__name__ for held in run.cache.tensors.values()} == {"OrtValue"}
    assert type(run.logits) is np.ndarray
    _, grown = onnx.step(run.cache, 5, prompts[0].next_position)
    assert {type(held).__name__ for held in grown.tensors.values()} == {"OrtValue"}
    assert answers(onnx, prompts[:1], []) == expected[:1]
    assert answers(onnx, prompts, []) == expected


def test_bf16_graphs_run_on_a_provider_as_they_do_on_the_cpu(
    trained: tuple[OnnxModel, list[Prompt]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU's provider does here what CUDA's is asked to: arrays of bf16 can be given to neither."""
    source = Source.of(open_checkpoint(str(Path(load_recipe("tiny-qwen25vl").checkpoint))), qwen25vl)
    write_onnx(source, "bf16", tmp_path, prune_layers=(2,), scales={})
    monkeypatch.setattr(providers, "_NAMES", {**providers._NAMES, "cuda": "CPUExecutionProvider"})
    monkeypatch.setattr(providers, "_DEVICES", {**providers._DEVICES, "cuda": "cpu"})
    monkeypatch.setattr(providers, "_OPTIONS", {})
    prompts = trained[1][:2]
    there, here = OnnxModel(tmp_path, threads=1, provider="cuda"), OnnxModel(tmp_path, threads=1)
    assert (there.device, here.device) == ({"provider": "cuda"}, {})
    assert answers(there, prompts, []) == answers(here, prompts, [])


def test_rows_go_on_when_another_has_ended(trained: tuple[OnnxModel, list[Prompt]]) -> None:
    onnx, prompts = trained
    endless = answers(onnx, prompts, [])
    word = endless[0][0]
    ended = answers(onnx, prompts, [word])
    expected = [answer[: answer.index(word)] if word in answer else answer for answer in endless]
    assert [] in expected and LIMIT in map(len, expected)
    assert ended == expected
