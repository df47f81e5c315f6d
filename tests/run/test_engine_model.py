"""Generation on engines: what is asked of CUDA and TensorRT, and that padded caches compute the same.

What an engine computes needs a GPU and is not tested here: the stand-ins compute nothing.
"""

import ctypes
import gc
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from capa_export.base.errors import CapaError, ExitCode
from capa_export.bundle.store import Bundle
from capa_export.model.generation import GenerationOptions
from capa_export.model.prompt import Prompt, Prompter, Turn
from capa_export.model.source import Source
from capa_export.run.decoding import greedy
from capa_export.run.engine import require_engines
from capa_export.run.engine_model import EngineModel
from capa_export.run.execution import Arena
from capa_export.run.onnx import OnnxModel
from tests.building import answer
from tests.conftest import noise, recorded
from tests.fake_driver import FakeDriver, has_driver
from tests.fake_tensorrt import PRUNE_LAYER, FakeTensorRT, write_bundle
from tests.generating import HEADS, LAYERS, LIMIT, ROW, generate, num_keep


@pytest.mark.skipif(has_driver(), reason="this machine has an NVIDIA driver")
def test_without_a_gpu_nothing_is_begun(built: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bundle, "verify", lambda *_: pytest.fail("files were read"))
    with pytest.raises(CapaError, match=r"^no GPU: the NVIDIA driver") as error:
        answer(built, [[Turn("user", ["what ?"])]], engine="rtx")
    assert error.value.code == ExitCode.PREFLIGHT
    assert "\n" not in str(error.value)


def test_prefill_has_every_shape_and_address(
    engines: EngineModel, driver: FakeDriver, trt: FakeTensorRT, prompts: list[Prompt]
) -> None:
    prompt = prompts[0]
    run = engines.prefill(prompt, [64])
    visual, prefill = driver.named("executeAsync")
    assert visual[1:3] == ("visual/visual", {"pixel_values": prompt.pictures[0].patches.shape})
    num_tokens, num_text = len(prompt.input_ids), len(prompt.text_positions)
    _, name, shapes, addresses = prefill
    assert name == "llm/prefill"
    assert shapes == {
        "inputs_embeds": (1, num_tokens, 64),
        "position_ids": (3, num_tokens),
        "text_positions": (num_text,),
        "num_keep": (1,),
    }
    # What sizes depend on is read from host memory, which must still be there.
    assert addresses["num_keep"] not in driver.buffers
    assert (ctypes.c_int64 * 1).from_address(addresses["num_keep"])[0] == 64
    # Past the end of no buffer, as the stand-in checks; and of no larger one than needed.
    past = {name: run.cache.tensors[name] for name in run.cache.tensors}
    kept = 64 + num_text
    assert {name: one.num_bytes for name, one in past.items()} == {
        f"past_key_values.{layer}.{part}": HEADS * (num_tokens if layer < PRUNE_LAYER else kept) * ROW
        for layer in range(LAYERS)
        for part in ("key", "value")
    }
    assert all(addresses[name.replace("past_key_values", "present")] == one.address for name, one in past.items())
    assert run.cache.lengths.tolist() == [[num_tokens], [kept]]
    assert (run.logits.shape, run.logits.dtype) == ((engines._embedding.shape[0],), np.float32)
    assert (run.kept[0].shape, run.kept[0].dtype) == ((kept,), np.int64)


def test_a_batch_has_its_prompts_at_the_start_and_zeros_behind(
    engines: EngineModel, driver: FakeDriver, prompts: list[Prompt]
) -> None:
    runs = [engines.prefill(prompt, num_keep(prompt)) for prompt in prompts]
    driver.calls.clear()
    cache = engines.batch([run.cache for run in runs], LIMIT)
    assert cache.rows == (512, 256)
    assert cache.lengths.tolist() == [[len(prompt.input_ids) for prompt in prompts], [len(r.kept[0]) for r in runs]]
    for name, past in cache.tensors.items():
        rows = cache.rows[stage(name)]
        own = [run.cache.tensors[name] for run in runs]
        mine = [call for call in driver.calls if touches(call, past.address, past.num_bytes)]
        assert past.num_bytes == 2 * HEADS * rows * ROW
        assert mine[0][:4] == ("cuMemsetD8Async", past.address, 0, past.num_bytes)
        for index, (_, copy, _) in enumerate(mine[1:]):
            width = own[index].num_bytes // HEADS
            assert (int(copy.srcDevice), copy.srcPitch) == (own[index].address, width)
            start = past.address + index * HEADS * rows * ROW
            assert (int(copy.dstDevice), copy.dstPitch) == (start, rows * ROW)
            assert (copy.WidthInBytes, copy.Height) == (width, HEADS)
        assert len(mine) == 3


def stage(name: str) -> int:
    """How many stages have pruned this past input."""
    return int(int(name.split(".")[1]) >= PRUNE_LAYER)


def touches(call: tuple[Any, ...], address: int, num_bytes: int) -> bool:
    """Whether a call writes to this memory."""
    if call[0] == "cuMemcpy2DAsync":
        return address <= int(call[1].dstDevice) < address + num_bytes
    return call[0] == "cuMemsetD8Async" and call[1] == address


def test_tensorrt_has_no_kernels_to_specialize(
    built: Bundle, driver: FakeDriver, trt: FakeTensorRT, prompts: list[Prompt]
) -> None:
    del trt.DynamicShapesKernelSpecializationStrategy
    engines = EngineModel(require_engines(built, "rtx"))
    assert generate(engines, prompts) == LIMIT
    assert [context.config for context in trt.contexts.values()] == [None] * 3


def test_a_failing_engine_is_one_line(
    engines: EngineModel, trt: FakeTensorRT, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trt.contexts["llm/prefill"], "execute_async_v3", lambda stream: False)
    with pytest.raises(CapaError, match=r"prefill\.engine: failed to run \(tensorrt_rtx: it gave no reason\)$"):
        engines.prefill(prompts[0], [64])


def test_every_buffer_is_freed(engines: EngineModel, driver: FakeDriver, prompts: list[Prompt]) -> None:
    before = dict(driver.buffers)
    runs = [engines.prefill(prompt, num_keep(prompt)) for prompt in prompts]
    # Keys and values, and nothing else.
    assert len(driver.buffers) == len(before) + len(prompts) * 2 * LAYERS
    list(greedy(engines, prompts, runs, [], LIMIT))
    del runs
    engines._steps.clear()
    engines._arena = Arena()
    gc.collect()
    assert driver.buffers == before


def test_a_second_answer_has_memory_and_graph_of_the_first(
    engines: EngineModel, driver: FakeDriver, prompts: list[Prompt]
) -> None:
    generate(engines, prompts)
    used = sum(driver.buffers.values())
    driver.calls.clear()
    generate(engines, prompts)
    assert sum(driver.buffers.values()) == used
    assert len(driver.graphs) == 1
    assert len(driver.named("cuGraphLaunch")) == LIMIT - 1
    assert not driver.named("cuMemHostAlloc")


def test_an_answer_of_another_length_has_a_graph_of_its_own_in_the_same_memory(
    engines: EngineModel, driver: FakeDriver, prompts: list[Prompt]
) -> None:
    used = []
    for asked in (prompts, prompts[1:], prompts, prompts[1:]):
        generate(engines, asked)
        used.append(engines.memory["kv_cache"])
    assert len(driver.graphs) == 2
    assert len(set(used)) == 1


def test_a_longer_answer_makes_room_and_drops_what_was_captured(
    engines: EngineModel, driver: FakeDriver, prompts: list[Prompt]
) -> None:
    generate(engines, prompts[1:])
    small = engines.memory["kv_cache"]
    generate(engines, prompts)
    assert engines.memory["kv_cache"] > small
    assert len(driver.named("cuGraphExecDestroy")) == 1
    generate(engines, prompts[1:])
    assert len(driver.graphs) == 3


def test_a_cache_that_is_in_use_keeps_its_memory(
    engines: EngineModel, driver: FakeDriver, prompts: list[Prompt]
) -> None:
    runs = [engines.prefill(prompt, num_keep(prompt)) for prompt in prompts]
    first = engines.batch([run.cache for run in runs], LIMIT)
    other = engines.batch([run.cache for run in runs], LIMIT)
    assert not {one.address for one in first.tensors.values()} & {one.address for one in other.tensors.values()}
    del first, other
    third = engines.batch([run.cache for run in runs], LIMIT)
    assert [third.steps] == list(engines._steps.values())


def test_all_engines_share_the_activations_of_the_largest(
    engines: EngineModel, driver: FakeDriver, trt: FakeTensorRT, prompts: list[Prompt]
) -> None:
    generate(engines, prompts)
    (memory,) = {context.memory for context in trt.contexts.values()}
    assert memory is not None and driver.buffers[memory[0]] == memory[1] == engines.memory["contexts"] == 3000


def test_another_thread_goes_on_with_what_one_began(
    engines: EngineModel, driver: FakeDriver, prompts: list[Prompt]
) -> None:
    with ThreadPoolExecutor(1) as pool:
        runs = [pool.submit(engines.prefill, prompt, num_keep(prompt)).result() for prompt in prompts]
    assert len(list(greedy(engines, prompts, runs, [], LIMIT))) == LIMIT
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(generate, engines, prompts).result() == LIMIT


@pytest.mark.parametrize(
    ("sizes", "keep", "new_tokens", "problem"),
    [
        ((448,), 64, 600, "decode.engine: takes 1 to 768 of dimension past, not 867;"),
        ((448,), 257, 4, "prefill.engine: takes 0 to 256 of num_keep, not 257;"),
        ((728,), 64, 4, "prefill.engine: takes 1 to 600 of dimension sequence, not 688;"),
        ((56,) * 5, 1, 4, "decode.engine: takes 1 to 4 of dimension batch, not 5;"),
        ((1848,), 64, 4, "visual.engine: takes 1 to 64 of dimension rows, not 66;"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(
    engines: EngineModel,
    driver: FakeDriver,
    prompter: Prompter,
    sizes: tuple[int, ...],
    keep: int,
    new_tokens: int,
    problem: str,
) -> None:
    asked = [prompter("what ?", [noise(size, size)]) for size in sizes]
    with pytest.raises(CapaError) as error:
        engines.check(asked, [[keep]] * len(asked), new_tokens)
    assert problem in str(error.value)
    assert "widen the target's limits and build the engines again" in str(error.value)
    assert not driver.calls


def test_a_cache_ends_at_the_engine_s_limit(engines: EngineModel, driver: FakeDriver, prompts: list[Prompt]) -> None:
    """600 rows are three blocks."""
    run = engines.prefill(prompts[0], [64])
    room = 768 - len(prompts[0].input_ids) + 1
    engines.check([prompts[0]], [[64]], room)
    assert engines.batch([run.cache], room).rows[0] == 768
    with pytest.raises(CapaError, match="dimension past, not 769"):
        engines.batch([run.cache], room + 1)


def test_an_answer_comes_from_the_engines(
    built: Bundle, driver: FakeDriver, trt: FakeTensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    asked = [[Turn("user", [noise(56, 84), "what ?"])]]
    (result,) = answer(built, asked, options=GenerationOptions(max_new_tokens=3), stream=told.append, engine="rtx")
    assert (result["gpu"], result["new_tokens"], len(told)) == ("Fake", 3, 4)
    assert result["stages"] == [{"layer": PRUNE_LAYER, "where": f"after layer {PRUNE_LAYER}", "kept": 2, "visual": 6}]
    assert set(result["gpu_bytes"]) == {"weights", "plans", "contexts", "kv_cache"}
    monkeypatch.setattr(OnnxModel, "prefill", lambda *_: pytest.fail("ONNX Runtime ran"))
    with pytest.raises(CapaError, match="dimension past, not"):
        answer(built, asked, options=GenerationOptions(max_new_tokens=900), engine="rtx")


def test_an_answer_that_nobody_fixed_ends_with_the_engines(
    built: Bundle, driver: FakeDriver, trt: FakeTensorRT, tmp_path: Path
) -> None:
    copy = Bundle(shutil.copytree(built.folder, tmp_path / "copy"))
    config = copy.folder / "onnx/llm/generation_config.json"
    config.write_text(json.dumps({"max_length": 4096, "eos_token_id": 10**6}), encoding="utf-8")
    recorded(copy)
    asked = [[Turn("user", [noise(56, 84), "what ?"])]]
    (result,) = answer(copy, asked, engine="rtx")
    assert result["new_tokens"] == result["generation"]["max_new_tokens"] == 768 - result["prompt_tokens"] + 1
    with pytest.raises(CapaError, match="dimension past, not"):
        answer(copy, asked, options=GenerationOptions(max_new_tokens=4000), engine="rtx")


def test_a_changed_engine_is_noticed(built: Bundle, driver: FakeDriver, trt: FakeTensorRT, tmp_path: Path) -> None:
    copy = Bundle(shutil.copytree(built.folder, tmp_path / "changed"))
    with (copy.folder / "engines/rtx/llm/decode.engine").open("a", encoding="utf-8") as file:
        file.write(" ")
    with pytest.raises(CapaError, match=r"decode\.engine: missing or changed since it was built"):
        answer(copy, [[Turn("user", ["what ?"])]], engine="rtx")
    assert not driver.named("cuMemAlloc")


@pytest.mark.parametrize("selector", ["vispruner", "adafv-style"])
def test_a_selector_that_looks_at_the_tower_takes_a_prompt_without_pictures(
    source: Source, prompter: Prompter, driver: FakeDriver, trt: FakeTensorRT, tmp_path: Path, selector: str
) -> None:
    engines = EngineModel(require_engines(write_bundle(source, tmp_path, selector=selector), "rtx"))
    prompt = prompter("what color is the star ?", [])
    run = engines.prefill(prompt, [0])
    assert "visual_saliency" in trt.contexts["llm/prefill"].shapes
    assert run.cache.lengths[0].tolist() == [len(prompt.input_ids)]
