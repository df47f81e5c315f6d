"""Real processes are told to end: cleanly the first time, at once the second."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import onnx
import pytest

from capa_export.base.errors import ExitCode
from capa_export.cli import main

_COMMAND = """
import signal, sys, time
# Who runs the tests in the background has SIGINT ignored, which is inherited.
signal.signal(signal.SIGINT, signal.default_int_handler)
from capa_export.cli import app, main

@app.command()
def work():
    {work}

sys.exit(main(["work"]))
"""
_KERNEL = """
    import numpy, onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession({path!r}, options, providers=["CPUExecutionProvider"])
    side = numpy.ones((12000, 12000), numpy.float32)
    print("ready", flush=True)
    session.run(None, {{"x": side}})
"""
_SLEEP = """
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("cleaned", flush=True)
"""
_LONG_GOODBYE = """
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        time.sleep(60)
"""

Started = Callable[[str], "subprocess.Popen[str]"]


@pytest.fixture
def started() -> Iterator[Started]:
    """Starts a command, and returns once it is at work."""
    processes: list[subprocess.Popen[str]] = []

    def start(work: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", _COMMAND.format(work=work.strip())]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, text=True, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A command that sits in one kernel of ONNX Runtime for a minute."""
    path = tmp_path_factory.mktemp("kernel") / "long.onnx"
    square = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [12000, 12000])
    result = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [12000, 12000])
    node = onnx.helper.make_node("MatMul", ["x", "x"], ["y"])
    graph = onnx.helper.make_graph([node], "long", [square], [result])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), path)
    return _KERNEL.format(path=str(path))


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, ExitCode.INTERRUPTED), (signal.SIGTERM, ExitCode.TERMINATED)]
)
def test_the_second_ends_at_once_inside_a_kernel(started: Started, kernel: str, number: int, code: int) -> None:
    process = started(kernel)
    time.sleep(0.5)
    process.send_signal(number)
    assert process.stderr is not None
    assert "once more ends at once" in process.stderr.readline()
    assert process.poll() is None
    process.send_signal(number)
    assert process.wait(timeout=10) == code


def test_the_first_ends_cleanly(started: Started) -> None:
    process = started(_SLEEP)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (ExitCode.INTERRUPTED, "cleaned\n")
    assert err == "interrupted; the same command goes on where it stopped\n"


def test_the_second_ends_a_clean_end_that_takes_too_long(started: Started) -> None:
    process = started(_LONG_GOODBYE)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == ExitCode.TERMINATED


def test_nothing_is_left_behind() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), signal.set_wakeup_fd(-1)
    assert main(["--version"]) == ExitCode.OK
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), signal.set_wakeup_fd(-1)) == before
