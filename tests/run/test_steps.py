"""Decode steps on engines: what is on the stream in one, in which memory, and its CUDA graph.

What an engine computes needs a GPU and is not tested here: the stand-ins compute nothing.
"""

import ctypes
from typing import Any

import numpy as np
import pytest
from cuda.bindings import driver as real

from capa_export.model.prompt import Prompt
from capa_export.run.decoding import greedy
from capa_export.run.engine_model import EngineModel
from capa_export.run.execution import Execution
from tests.fake_driver import FakeDriver
from tests.fake_tensorrt import PRUNE_LAYER, FakeTensorRT
from tests.generating import HEADS, LAYERS, LIMIT, ROW, generate, num_keep


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
    launch, copy = "cuLaunchKernel", "cuMemcpyDtoHAsync"
    assert [call[0] for call in graph] == [launch, "executeAsync", launch, launch, copy]
    assert [call[1][0] for call in graph if call[0] == launch] == ["embed_tokens", "score_tokens", "take_likeliest"]
    # To the host goes a token of each answer.
    assert graph[-1][3] == 8 * len(prompts)
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


def test_of_tokens_from_the_host_only_three_small_inputs_change_from_step_to_step(
    engines: EngineModel, driver: FakeDriver, trt: FakeTensorRT, prompts: list[Prompt]
) -> None:
    fed: list[tuple[int, bytes]] = []
    upload = driver._cuMemcpyHtoDAsync

    def copied(target: int, source: int, num_bytes: int, stream: Any) -> tuple[()]:
        fed.append((target, ctypes.string_at(source, num_bytes)))
        return upload(target, source, num_bytes, stream)

    runs = [engines.prefill(prompt, num_keep(prompt)) for prompt in prompts]
    engines.chooses = False
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


@pytest.mark.parametrize("chooses", [True, False])
def test_a_step_neither_allocates_nor_copies_what_is_not_pinned(
    engines: EngineModel,
    driver: FakeDriver,
    prompts: list[Prompt],
    chooses: bool,  # noqa: FBT001
) -> None:
    engines.chooses = chooses
    runs = [engines.prefill(prompt, num_keep(prompt)) for prompt in prompts]
    steps = greedy(engines, prompts, runs, [], LIMIT)
    for _ in range(3):
        next(steps)
    driver.calls.clear()
    assert len(list(steps)) == LIMIT - 3
    assert {call[0] for call in driver.calls} == {"cuGraphLaunch", "cuMemcpy3DAsync", "cuStreamSynchronize"}
    (graph,) = driver.graphs.values()
    assert ("cuMemcpyHtoDAsync" in [call[0] for call in graph]) == (not chooses)


def test_where_the_device_cannot_choose_the_host_does_and_says_so_once(
    engines: EngineModel,
    driver: FakeDriver,
    prompts: list[Prompt],
    capsys: pytest.CaptureFixture[str],
) -> None:
    driver.fails["cuModuleLoadData"] = status = real.CUresult.CUDA_ERROR_NO_BINARY_FOR_GPU
    assert generate(engines, prompts) == LIMIT
    assert generate(engines, prompts) == LIMIT
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"tokens are chosen on the host, which is slower: the GPU failed: cuModuleLoadData: {status.name}"
    assert not driver.named("cuLaunchKernel")


def test_without_triton_the_host_chooses(
    engines: EngineModel, prompts: list[Prompt], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("capa_export.kernels.find_spec", lambda _: None)
    assert generate(engines, prompts) == LIMIT
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tokens are chosen on the host, which is slower: kernels need triton: pip install")


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
