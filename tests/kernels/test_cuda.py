"""What is asked of the CUDA driver, and what its refusals become."""

import gc
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from cuda.bindings import driver as real

from capa_export.base.errors import CapaError, ExitCode
from capa_export.kernels.cuda import Buffer, PinnedBuffer, Rows, Stream, require_gpu
from tests.fake_driver import FakeDriver, has_driver

Result = real.CUresult


@pytest.mark.skipif(has_driver(), reason="this machine has an NVIDIA driver")
def test_a_machine_without_a_driver_is_refused_in_one_line() -> None:
    with pytest.raises(CapaError, match=r"^no GPU: the NVIDIA driver \(libcuda\) is not installed.*--engine$") as error:
        require_gpu()
    assert error.value.code == ExitCode.PREFLIGHT == 3


def test_facts(driver: FakeDriver) -> None:
    gpu = require_gpu()
    assert (gpu.name, gpu.compute_capability, gpu.memory_bytes, gpu.cuda) == ("Fake", "8.9", 1 << 30, "13.1")


def test_a_driver_without_a_device_is_refused(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    driver.fails["cuInit"] = Result.CUDA_ERROR_NO_DEVICE
    with pytest.raises(CapaError, match="no GPU: the NVIDIA driver says CUDA_ERROR_NO_DEVICE"):
        require_gpu()
    driver.fails.clear()
    monkeypatch.setattr(driver, "_cuDeviceGetCount", lambda: (0,))
    with pytest.raises(CapaError, match="finds no device"):
        require_gpu()


def test_a_failure_names_the_function(driver: FakeDriver) -> None:
    stream = Stream()
    driver.fails["cuStreamSynchronize"] = Result.CUDA_ERROR_ILLEGAL_ADDRESS
    with pytest.raises(CapaError, match="cuStreamSynchronize: CUDA_ERROR_ILLEGAL_ADDRESS"):
        stream.synchronize()


def test_memory_is_freed_with_its_last_reference(driver: FakeDriver) -> None:
    first, empty = Buffer(100), Buffer(0)
    assert driver.buffers == {first.address: 100, empty.address: 1}
    other = first
    del first
    assert other.address in driver.buffers
    del other, empty
    gc.collect()
    assert not driver.buffers


def test_no_memory_left_says_how_much_is_needed(driver: FakeDriver) -> None:
    held = Buffer(1 << 29)
    with pytest.raises(CapaError, match=r"0\.54 of its 1\.07 GB left and 1\.07 GB more are needed .*OUT_OF_MEMORY"):
        Buffer(1 << 30)
    assert list(driver.buffers) == [held.address]


def test_copies_go_where_they_should(driver: FakeDriver) -> None:
    stream, buffer = Stream(), Buffer(64)
    array = np.arange(8, dtype=np.float32)
    stream.upload(buffer, array, at=16)
    assert driver.named("cuMemcpyHtoDAsync") == [
        ("cuMemcpyHtoDAsync", buffer.address + 16, array.ctypes.data, 32, stream.handle)
    ]
    assert stream.download(buffer, (2, 4), np.float32).shape == (2, 4)
    (_, _, source, num_bytes, handle), synchronized = driver.calls[-2:]
    assert (source, num_bytes, handle) == (buffer.address, 32, stream.handle)
    # The array is the caller's as soon as it has it.
    assert synchronized == ("cuStreamSynchronize", stream.handle)
    with pytest.raises(AssertionError):
        stream.upload(buffer, np.zeros(17, np.float32))
    with pytest.raises(AssertionError):
        stream.download(buffer, (17,), np.float32)


def test_nothing_is_copied_where_there_is_nothing(driver: FakeDriver) -> None:
    stream, buffer = Stream(), Buffer(0)
    stream.upload(buffer, np.zeros((0, 3), np.int64))
    stream.zero(buffer)
    stream.copy_rows(Rows(buffer.address, 8), Rows(buffer.address, 8), 0, 4)
    assert stream.download(buffer, (0, 3), np.int64).shape == (0, 3)
    assert not driver.named("cuMemcpyHtoDAsync", "cuMemsetD8Async", "cuMemcpy2DAsync", "cuMemcpyDtoHAsync")


def test_rows_are_copied_by_their_pitches(driver: FakeDriver) -> None:
    stream, source, target = Stream(), Buffer(4 * 20), Buffer(4 * 30)
    stream.copy_rows(Rows(target.address + 10, 30), Rows(source.address, 20), 20, 4)
    ((_, copy, handle),) = driver.named("cuMemcpy2DAsync")
    device = real.CUmemorytype.CU_MEMORYTYPE_DEVICE
    assert (copy.srcMemoryType, copy.dstMemoryType, handle) == (device, device, stream.handle)
    assert (int(copy.srcDevice), copy.srcPitch) == (source.address, 20)
    assert (int(copy.dstDevice), copy.dstPitch) == (target.address + 10, 30)
    assert (copy.WidthInBytes, copy.Height) == (20, 4)


def test_a_graph_is_captured_once_and_launched_often(driver: FakeDriver) -> None:
    stream, buffer = Stream(), Buffer(8)
    graph = stream.capture(lambda: stream.zero(buffer))
    for _ in range(3):
        graph.launch(stream)
    assert driver.graphs == {"graph0": [("cuMemsetD8Async", buffer.address, 0, 8, stream.handle)]}
    names = [call[0] for call in driver.calls]
    assert names[names.index("cuStreamBeginCapture") :] == [
        "cuStreamBeginCapture",
        "cuMemsetD8Async",
        "cuStreamEndCapture",
        "cuGraphInstantiate",
        "cuGraphDestroy",
        *["cuGraphLaunch"] * 3,
    ]
    del graph
    gc.collect()
    assert driver.calls[-1] == ("cuGraphExecDestroy", "graph0")


def refuse() -> None:
    raise CapaError("cannot be captured")


@pytest.mark.parametrize("end", [Result.CUDA_SUCCESS, Result.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED])
def test_a_capture_that_fails_is_ended(driver: FakeDriver, end: Any) -> None:
    driver.fails["cuStreamEndCapture"] = end
    with pytest.raises(CapaError, match=r"^cannot be captured$"):
        Stream().capture(refuse)
    assert driver.capturing is None
    # A graph of what was captured up to there is not left behind.
    assert len(driver.named("cuGraphDestroy")) == (end == Result.CUDA_SUCCESS)
    assert not driver.named("cuGraphInstantiate")


@pytest.mark.parametrize("function", ["cuStreamEndCapture", "cuGraphInstantiate"])
def test_a_graph_that_does_not_come_about_is_an_error(driver: FakeDriver, function: str) -> None:
    driver.fails[function] = Result.CUDA_ERROR_NOT_SUPPORTED
    stream, buffer = Stream(), Buffer(8)
    with pytest.raises(CapaError, match=f"{function}: CUDA_ERROR_NOT_SUPPORTED"):
        stream.capture(lambda: stream.zero(buffer))


def test_the_stand_in_refuses_what_the_driver_would(driver: FakeDriver) -> None:
    stream, buffer = Stream(), Buffer(8)
    with pytest.raises(TypeError):
        driver.cuMemcpyHtoDAsync(buffer.address, 0, 8)
    with pytest.raises(AttributeError):
        driver.cuNoSuchFunction()
    with pytest.raises(AssertionError, match="past the end"):
        stream.copy_rows(Rows(buffer.address, 4), Rows(buffer.address, 4), 4, 3)
    with pytest.raises(AssertionError, match="not allocated"):
        stream.copy_rows(Rows(64, 4), Rows(buffer.address, 4), 4, 2)


def test_pinned_memory_is_written_and_read_by_the_gpu(driver: FakeDriver) -> None:
    stream, buffer, pinned = Stream(), Buffer(64), PinnedBuffer(64)
    pinned.view(16, (2, 3), np.int64)[...] = 5
    assert bytes(driver.pinned[pinned.address]) == bytes(16) + np.full(6, 5).tobytes()

    def there_and_back() -> None:
        stream.copy_in(buffer, pinned)
        stream.copy_out(pinned, buffer)

    stream.capture(there_and_back).launch(stream)
    with pytest.raises(AssertionError):
        pinned.view(16, (7,), np.int64)
    other = PinnedBuffer(8)
    del other
    gc.collect()
    assert list(driver.pinned) == [pinned.address]


@pytest.mark.parametrize("what", [KeyboardInterrupt(), ValueError(), CapaError("no")])
def test_whatever_comes_between_ends_the_capture(driver: FakeDriver, what: BaseException) -> None:
    def work() -> None:
        raise what

    stream, buffer = Stream(), Buffer(8)
    with pytest.raises(type(what)):
        stream.capture(work)
    assert driver.capturing is None and gc.isenabled()
    stream.capture(lambda: stream.zero(buffer))


@pytest.mark.parametrize("function", ["cuMemAlloc", "cuStreamSynchronize"])
def test_what_a_capture_does_not_survive_is_an_error(driver: FakeDriver, function: str) -> None:
    stream = Stream()

    def work() -> None:
        if function == "cuMemAlloc":
            Buffer(8)
        else:
            stream.synchronize()

    with pytest.raises(CapaError, match="STREAM_CAPTURE_UNSUPPORTED"):
        stream.capture(work)
    assert driver.capturing is None and not driver.graphs


def test_no_collection_comes_between(driver: FakeDriver) -> None:
    """One may free memory, whichever line it happens at."""
    stream, cycle = Stream(), [Buffer(8)]
    cycle.append(cycle)  # type: ignore[arg-type]
    del cycle
    threshold = gc.get_threshold()
    gc.set_threshold(1)
    try:
        stream.capture(lambda: [[] for _ in range(100)] and None)
    finally:
        gc.set_threshold(*threshold)
    assert len(driver.graphs) == 1


def test_memory_may_be_used_and_freed_in_any_thread(driver: FakeDriver) -> None:
    stream, held = Stream(), [Buffer(8)]
    with ThreadPoolExecutor(1) as pool:
        pool.submit(stream.zero, held[0]).result()
        held.append(pool.submit(Buffer, 8).result())
        pool.submit(held.clear).result()
    gc.collect()
    assert not driver.buffers


def test_the_stand_in_wants_a_context_in_each_thread(driver: FakeDriver) -> None:
    Stream()
    with ThreadPoolExecutor(1) as pool:
        (status, _) = pool.submit(driver.cuMemAlloc, 8).result()
    assert status == Result.CUDA_ERROR_INVALID_CONTEXT
