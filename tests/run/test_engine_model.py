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
from cuda.bindings import driver as real

from capa_export.base.errors import CapaError, ExitCode
from capa_export.bundle.store import Bundle
from capa_export.model.generation import GenerationOptions
from capa_export.model.prompt import Prompt, Prompter, Turn
from capa_export.model.source import Source
from capa_export.run.decoding import greedy
from capa_export.run.engine import require_engines
from capa_export.run.engine_model import EngineModel
from capa_export.run.execution import Arena, Execution
from capa_export.run.onnx import OnnxModel
from tests.building import answer
from tests.conftest import noise, recorded
from tests.fake_driver import PRUNE_LAYER, FakeDriver, FakeTensorRT, has_driver, write_bundle

LAYERS, HEADS, ROW = 5, 2, 16 * 2
"""The random model: GQA with two KV heads of 16 numbers in FP16."""
LIMIT = 6


@pytest.fixture(scope="module")
def built(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(source, tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def prompts(prompter: Prompter) -> list[Prompt]:
    """Of 256 and of 64 visual tokens."""
    return [prompter("what color is the star ?", [noise(size, size)]) for size in (448, 224)]


def num_keep(prompt: Prompt) -> list[int]:
    return [prompt.num_visual // 4]


@pytest.mark.skipif(has_driver(), reason="this machine has an NVIDIA driver")
def test_without_a_gpu_nothing_is_begun(built: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bundle, "verify", lambda *_: pytest.fail("files were read"))
    with pytest.raises(CapaError, match=r"^no GPU: the NVIDIA driver") as error:
        answer(built, [[Turn("user", ["what ?"])]], engine="rtx")
    assert error.value.code == ExitCode.PREFLIGHT
    assert "\n" not in str(error.value)


@pytest.fixture
def engines(built: Bundle, driver: FakeDriver, trt: FakeTensorRT) -> EngineModel:
    loaded = EngineModel(require_engines(built, "rtx"))
    driver.calls.clear()
    return loaded


def generate(engines: EngineModel, prompts: list[Prompt], limit: int = LIMIT) -> int:
    """Number of tokens of each answer."""
    runs = [engines.prefill(prompt, num_keep(prompt)) for prompt in prompts]
    return len(list(greedy(engines, prompts, runs, [], limit)))


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


def test_decode_is_captured_once_and_replayed(
    engines: EngineModel, driver: FakeDriver, trt: FakeTensorRT, prompts: list[Prompt]
) -> None:
    assert generate(engines, prompts) == LIMIT
    order = [call for call in driver.calls if call[0] in {"executeAsync", "cuStreamBeginCapture", "cuGraphLaunch"}]
    # The first token is prefill's. The first step runs as it is, the second is captured.
    assert [call[1] if call[0] == "executeAsync" else call[0] for call in order] == [
        *["visual/visual", "llm/prefill"] * 2,
        "llm/decode",
        "cuStreamBeginCapture",
        "llm/decode",
        *["cuGraphLaunch"] * (LIMIT - 2),
    ]
    plain, captured = driver.named("executeAsync")[-2:]
    assert plain == captured
    strategies = {name: one.config.dynamic_shapes_kernel_specialization_strategy for name, one in trt.contexts.items()}
    assert strategies == {"visual/visual": "lazy", "llm/prefill": "lazy", "llm/decode": "eager"}


def test_a_step_writes_its_rows_behind_those_that_count(
    engines: EngineModel, driver: FakeDriver, trt: FakeTensorRT, prompts: list[Prompt]
) -> None:
    generate(engines, prompts)
    (graph,) = driver.graphs.values()
    # Whatever moves with the length is outside.
    assert [call[0] for call in graph] == ["cuMemcpyHtoDAsync", "executeAsync", "cuMemcpyDtoHAsync"]
    shapes, addresses = graph[1][2:4]
    copies = [call[1] for call in driver.named("cuMemcpy3DAsync")]
    lengths = [[len(prompt.input_ids) for prompt in prompts], [len(prompt.text_positions) for prompt in prompts]]
    lengths[1] = [text + keep[0] for text, keep in zip(lengths[1], map(num_keep, prompts), strict=True)]
    # One for all layers of a stage.
    assert len(copies) == (LIMIT - 1) * 2 * len(prompts)
    for index, copy in enumerate(copies):
        step, (after, prompt) = index // 4, divmod(index % 4, 2)
        layers = [PRUNE_LAYER, LAYERS - PRUNE_LAYER][after]
        first, rows = [0, PRUNE_LAYER][after], [512, 256][after]
        past, present = f"past_key_values.{first}.key", f"present.{first}.key"
        assert shapes[past] == (2, HEADS, rows // 256, 256, ROW // 2)
        row = prompt * HEADS * rows + lengths[after][prompt] + step
        assert int(copy.dstDevice) == addresses[past] + row * ROW
        assert (copy.dstPitch, copy.dstHeight) == (rows * ROW, 2 * HEADS)
        assert int(copy.srcDevice) == addresses[present] + prompt * HEADS * ROW
        assert (copy.srcPitch, copy.srcHeight * ROW) == (ROW, addresses[f"present.{first}.value"] - addresses[present])
        assert (copy.WidthInBytes, copy.Height, copy.Depth) == (ROW, HEADS, 2 * layers)
    # In one block, each behind the other.
    sizes = {addresses[name]: 2 * HEADS * 256 * shape[2] * ROW for name, shape in shapes.items() if "past_key" in name}
    ends = [address + size for address, size in sorted(sizes.items())]
    assert len(sizes) == 2 * LAYERS and ends[:-1] == sorted(sizes)[1:]
    assert driver.buffers[min(sizes)] == engines.memory["kv_cache"] == sum(sizes.values())


def test_only_three_small_inputs_change_from_step_to_step(
    engines: EngineModel, driver: FakeDriver, trt: FakeTensorRT, prompts: list[Prompt]
) -> None:
    fed: list[tuple[int, bytes]] = []
    upload = driver._cuMemcpyHtoDAsync

    def copied(target: int, source: int, num_bytes: int, stream: Any) -> tuple[()]:
        fed.append((target, ctypes.string_at(source, num_bytes)))
        return upload(target, source, num_bytes, stream)

    runs = [engines.prefill(prompt, num_keep(prompt)) for prompt in prompts]
    driver._cuMemcpyHtoDAsync = copied  # type: ignore[method-assign]
    list(greedy(engines, prompts, runs, [], LIMIT))
    shapes, addresses = (vars(trt.contexts["llm/decode"])[name] for name in ("shapes", "addresses"))
    # In one copy.
    assert len(fed) == LIMIT - 1
    assert len({(target, len(data)) for target, data in fed}) == 1

    def values(name: str) -> list[list[int]]:
        start, count = addresses[name] - fed[0][0], int(np.prod(shapes[name]))
        return [np.frombuffer(data, np.int64, count, start).tolist() for _, data in fed]

    full, kept = [len(prompt.input_ids) for prompt in prompts], [len(run.kept[0]) for run in runs]
    assert values("past_lengths") == [[n + step for n in (*full, *kept)] for step in range(LIMIT - 1)]
    starts = [prompt.next_position for prompt in prompts]
    assert values("position_ids") == [[n + step for n in starts] * 3 for step in range(LIMIT - 1)]


@pytest.mark.parametrize("obstacle", ["engine", "driver", "allocations"])
def test_without_a_graph_it_goes_on_and_says_so_once(
    engines: EngineModel,
    driver: FakeDriver,
    trt: FakeTensorRT,
    prompts: list[Prompt],
    capsys: pytest.CaptureFixture[str],
    obstacle: str,
) -> None:
    if obstacle == "engine":
        trt.fails_while_capturing = True
    elif obstacle == "driver":
        driver.fails["cuStreamEndCapture"] = real.CUresult.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED
    else:
        trt.capturable = False
    assert generate(engines, prompts) == generate(engines, prompts) == LIMIT
    (line,) = capsys.readouterr().err.splitlines()
    reason = {
        "engine": "failed to run (tensorrt_rtx: not while a stream is captured)",
        "driver": "cuStreamEndCapture: CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
        "allocations": "the engine allocates memory of its own while it runs",
    }
    assert line.startswith("decode runs without a CUDA graph, which is slower: ") and line.endswith(reason[obstacle])
    assert not driver.named("cuGraphLaunch")
    ran = [call for call in driver.named("executeAsync") if call[1] == "llm/decode"]
    # What was captured did not run, and runs after.
    assert len(ran) == 2 * (LIMIT - 1) + (obstacle != "allocations")


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


def test_a_step_neither_allocates_nor_copies_what_is_not_pinned(
    engines: EngineModel, driver: FakeDriver, prompts: list[Prompt]
) -> None:
    runs = [engines.prefill(prompt, num_keep(prompt)) for prompt in prompts]
    steps = greedy(engines, prompts, runs, [], LIMIT)
    for _ in range(3):
        next(steps)
    driver.calls.clear()
    assert len(list(steps)) == LIMIT - 3
    assert {call[0] for call in driver.calls} == {"cuGraphLaunch", "cuMemcpy3DAsync", "cuStreamSynchronize"}


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


def test_an_interrupt_while_a_step_is_captured_leaves_engines_that_run(
    engines: EngineModel, driver: FakeDriver, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    enqueue = Execution.enqueue

    def interrupt() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Execution, "enqueue", lambda self: enqueue(self) if driver.capturing is None else interrupt())
        with pytest.raises(KeyboardInterrupt):
            generate(engines, prompts)
    assert driver.capturing is None
    assert generate(engines, prompts) == LIMIT


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
