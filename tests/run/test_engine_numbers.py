"""Generation on engines that compute, in memory that a stand-in for the GPU holds."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from capa_export.base.errors import CapaError
from capa_export.base.precision import Precision
from capa_export.bundle.store import Bundle
from capa_export.kernels import cuda
from capa_export.model.generation import Generation
from capa_export.model.prompt import Prompt, Prompter
from capa_export.model.source import Source
from capa_export.run.decoding import TokenChooser, generate, greedy
from capa_export.run.engine import require_engines
from capa_export.run.engine_model import EngineModel
from capa_export.run.onnx import OnnxModel
from tests.computing_driver import ComputingDriver
from tests.conftest import noise
from tests.fake_driver import compile_from_ptx
from tests.fake_tensorrt import FakeTensorRT, write_bundle

STEPS = 6
NOWHERE = Path("generation_config.json")


@pytest.fixture(scope="module")
def bundle(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(source, tmp_path_factory.mktemp("bundle"))


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, bundle: Bundle) -> ComputingDriver:
    computing = ComputingDriver()
    monkeypatch.setattr("capa_export.kernels.plugins.launcher.compile_kernels", compile_from_ptx)
    monkeypatch.setattr(cuda, "_driver", lambda: computing)
    computing.open(bundle.folder / "onnx")
    return computing


@pytest.mark.parametrize(
    ("captures", "precision", "tolerance"),
    # FP16 rounds at other places, and FP32 adds in another order.
    [(True, "fp16", 2e-3), (False, "fp16", 2e-3), (False, "fp32", 1e-6)],
)
def test_an_answer_on_engines_is_that_of_onnx_runtime(
    source: Source,
    prompter: Prompter,
    driver: ComputingDriver,
    trt: FakeTensorRT,
    tmp_path: Path,
    captures: bool,  # noqa: FBT001
    precision: Precision,
    tolerance: float,
) -> None:
    """Two prompts side by side; the cache of one comes to a second block behind the stage that prunes."""
    bundle = write_bundle(source, tmp_path, precision=precision)
    driver.open(bundle.folder / "onnx")
    engines, onnx = EngineModel(require_engines(bundle, "rtx")), OnnxModel(bundle.folder / "onnx", threads=1)
    engines.captures = captures
    prompts = [prompter("what color is the star ?", [noise(size, size)]) for size in (448, 224)]
    keep = [[254 - len(prompts[0].text_positions)], [16]]
    own, other = (_answer(model, prompts, keep) for model in (engines, onnx))
    assert bool(driver.named("cuGraphLaunch")) == captures
    for found, wanted in zip(own, other, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_one_engine_that_is_prefill_and_decode_answers_as_two(
    source: Source,
    prompter: Prompter,
    driver: ComputingDriver,
    trt: FakeTensorRT,
    tmp_path: Path,
    precision: Precision,
) -> None:
    """One prompt after the other, of which the last has no picture; and several side by side are refused."""
    bundle = write_bundle(source, tmp_path, precision=precision, joined=True)
    driver.open(bundle.folder / "onnx", joined=True)
    engines, onnx = EngineModel(require_engines(bundle, "rtx")), OnnxModel(bundle.folder / "onnx", threads=1)
    assert engines.memory["plans"] == sum(path.stat().st_size for path in bundle.folder.rglob("*.engine"))
    prompts = [prompter("what color is the star ?", [noise(448, 448)]), prompter("what ?", [])]
    keep = [[254 - len(prompts[0].text_positions)], [0]]
    for prompt, kept in zip(prompts, keep, strict=True):
        own, other = (_answer(model, [prompt], [kept]) for model in (engines, onnx))
        for found, wanted in zip(own, other, strict=True):
            tolerance = {"fp16": 2e-3, "fp32": 1e-6}[precision]
            np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())
    assert driver.named("cuGraphLaunch")
    with pytest.raises(CapaError, match="takes 1 to 1 of dimension batch, not 2; ask one by one"):
        engines.check(prompts, keep, 4)


def test_tokens_are_chosen_on_the_device_of_one_engine_too(
    source: Source, prompter: Prompter, driver: ComputingDriver, trt: FakeTensorRT, tmp_path: Path
) -> None:
    bundle = write_bundle(source, tmp_path, joined=True)
    driver.open(bundle.folder / "onnx", joined=True)
    engines = EngineModel(require_engines(bundle, "rtx"))
    prompt = prompter("what color is the star ?", [noise(84, 84)])

    def said() -> list[list[int | None]]:
        run = engines.prefill(prompt, [prompt.num_visual // 4])
        return list(greedy(engines, [prompt], [run], [], STEPS))

    chosen = said()
    assert driver.named("cuLaunchKernel")
    driver.calls.clear()
    engines.chooses = False
    assert chosen == said() and not driver.named("cuLaunchKernel")


def _answer(model: Any, prompts: list[Prompt], keep: list[list[int]]) -> list[np.ndarray]:
    """Logits [B, V] of prefill and every step; the tokens are the same whatever they are."""
    runs = [model.prefill(prompt, kept) for prompt, kept in zip(prompts, keep, strict=True)]
    logits = [np.stack([run.logits for run in runs])]
    cache = model.batch([run.cache for run in runs], STEPS + 1)
    for step in range(STEPS):
        positions = [prompt.next_position + step for prompt in prompts]
        result, cache = model.append(cache, [[7 + step], [9 + step]][: len(prompts)], positions)
        logits.append(result.copy())
    return logits


SETTINGS = [
    {},
    {"repetition_penalty": 1.3, "suppress_tokens": [5, 6]},
    {"do_sample": True, "temperature": 1.5},
    {"do_sample": True, "top_k": 2**40, "suppress_tokens": [5, 2**70]},
    {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05},
]


@pytest.mark.parametrize(
    "given",
    [
        # The likeliest, and one by chance, with all that may be asked of either.
        pytest.param(given, marks=() if "repetition_penalty" in given else pytest.mark.exhaustive)
        for given in SETTINGS
    ],
    ids=str,
)
def test_tokens_chosen_on_the_device_are_those_of_the_host(
    bundle: Bundle, prompter: Prompter, driver: ComputingDriver, trt: FakeTensorRT, given: dict[str, Any]
) -> None:
    """Two answers side by side, kernels and graphs by value; and others after them in the same memory."""
    engines = EngineModel(require_engines(bundle, "rtx"))
    prompts = [prompter("what color is the star ?", [noise(size, size)]) for size in (84, 56)]
    settings = Generation(**given, source=NOWHERE)

    def said(seed: int, stop: list[int]) -> list[list[int | None]]:
        random = np.random.default_rng(seed)
        choosers = [TokenChooser(settings, prompt.input_ids.tolist(), stop, random) for prompt in prompts]
        runs = [engines.prefill(prompt, [prompt.num_visual // 4]) for prompt in prompts]
        return list(generate(engines, prompts, runs, choosers, stop, STEPS))

    seeds = (0,) if settings.do_sample else (0, 1)
    chosen = [said(seed, []) for seed in seeds]
    assert driver.named("cuLaunchKernel") and driver.named("cuGraphLaunch")
    # Tokens that end the answers at different places.
    stop = [int(chosen[0][2][0] or 0), int(chosen[0][4][1] or 0)]
    ended = said(0, stop)
    driver.calls.clear()
    engines.chooses = False
    assert chosen == [said(seed, []) for seed in seeds]
    assert ended == said(0, stop) and len(ended) < STEPS
    assert not driver.named("cuLaunchKernel")


def test_logits_that_are_no_numbers_are_said(
    bundle: Bundle, prompter: Prompter, driver: ComputingDriver, trt: FakeTensorRT
) -> None:
    engines = EngineModel(require_engines(bundle, "rtx"))
    prompts = [prompter("what ?", []) for _ in range(2)]
    runs = [engines.prefill(prompt, [0]) for prompt in prompts]
    runs[1].logits[7] = np.nan
    with pytest.raises(CapaError, match=r"logits are not finite.*validate --bisect"):
        next(greedy(engines, prompts, runs, [], 2))
    everything = Generation(suppress_tokens=[*range(len(runs[0].logits))], source=NOWHERE)
    chooser = TokenChooser(everything, [1], [])
    with pytest.raises(CapaError, match="leaves no token to say"):
        next(generate(engines, prompts[:1], runs[:1], [chooser], [], 2))
