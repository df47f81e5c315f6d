"""Generation on engines that compute: ONNX Runtime runs their graphs in memory that a stand-in for the GPU holds."""

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from capa_export.base.precision import Precision
from capa_export.kernels import cuda
from capa_export.model.prompt import Prompt, Prompter
from capa_export.model.source import Source
from capa_export.passes.cache_blocks import CacheBlocksPass
from capa_export.run.engine import require_engines
from capa_export.run.engine_model import EngineModel
from capa_export.run.onnx import OnnxModel
from tests.conftest import noise
from tests.fake_driver import GRAPHS, FakeDriver, FakeTensorRT, write_bundle

STEPS = 6


class ComputingDriver(FakeDriver):
    """A GPU whose memory holds what is copied to it, and whose engines are graphs on ONNX Runtime."""

    def __init__(self) -> None:
        super().__init__()
        self.data: dict[int, np.ndarray] = {}
        self.sessions: dict[str, Any] = {}

    def open(self, onnx: Path) -> None:
        """Take the graphs of a bundle."""
        for engine, file in GRAPHS.items():
            model = ir.load(onnx / file)
            CacheBlocksPass()(model)
            place = (onnx / file).with_suffix(".engine.onnx")
            ir.save(model, place)
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            self.sessions[engine] = onnxruntime.InferenceSession(str(place), options, ["CPUExecutionProvider"])

    def at(self, address: int, num_bytes: int) -> np.ndarray:
        """The bytes at an address."""
        self.check(address, num_bytes)
        start = max(start for start in self.buffers if start <= address)
        # What nobody wrote is no number.
        room = self.data.setdefault(start, np.full(self.buffers[start], 0xFF, np.uint8))
        return room[address - start :][:num_bytes]

    def _cuMemFree(self, address: int) -> tuple[()]:
        self.data.pop(address, None)
        return super()._cuMemFree(address)

    def _cuMemcpyHtoDAsync(self, target: int, source: int, num_bytes: int, stream: Any) -> tuple[()]:
        self.at(target, num_bytes)[:] = np.frombuffer(ctypes.string_at(source, num_bytes), np.uint8)
        return ()

    def _cuMemcpyDtoHAsync(self, target: int, source: int, num_bytes: int, stream: Any) -> tuple[()]:
        ctypes.memmove(target, self.at(source, num_bytes).tobytes(), num_bytes)
        return ()

    def _cuMemsetD8Async(self, address: int, value: int, num_bytes: int, stream: Any) -> tuple[()]:
        self.at(address, num_bytes)[:] = value
        return ()

    def _cuMemcpy2DAsync(self, copy: Any, stream: Any) -> tuple[()]:
        for row in range(copy.Height):
            self._move(copy, row * copy.srcPitch, row * copy.dstPitch)
        return super()._cuMemcpy2DAsync(copy, stream)

    def _cuMemcpy3DAsync(self, copy: Any, stream: Any) -> tuple[()]:
        for plane in range(copy.Depth):
            for row in range(copy.Height):
                source, target = (plane * height + row for height in (copy.srcHeight, copy.dstHeight))
                self._move(copy, source * copy.srcPitch, target * copy.dstPitch)
        return super()._cuMemcpy3DAsync(copy, stream)

    def _move(self, copy: Any, source: int, target: int) -> None:
        width = copy.WidthInBytes
        self.at(int(copy.dstDevice) + target, width)[:] = self.at(int(copy.srcDevice) + source, width)

    def execute(self, engine: str, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        session, feed = self.sessions[engine], {}
        for entry in session.get_inputs():
            dtype = {"tensor(float16)": np.float16, "tensor(int64)": np.int64, "tensor(float)": np.float32}[entry.type]
            shape, address = shapes.get(entry.name, tuple(entry.shape)), addresses[entry.name]
            num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
            on_device = any(start <= address < start + size for start, size in self.buffers.items())
            data = self.at(address, num_bytes).tobytes() if on_device else ctypes.string_at(address, num_bytes)
            feed[entry.name] = np.frombuffer(data, dtype).reshape(shape)
        names = [entry.name for entry in session.get_outputs()]
        for name, value in zip(names, session.run(names, feed), strict=True):
            self.at(addresses[name], value.nbytes)[:] = np.ascontiguousarray(value).view(np.uint8).reshape(-1)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> ComputingDriver:
    computing = ComputingDriver()
    monkeypatch.setattr(cuda, "_driver", lambda: computing)
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


def _answer(model: Any, prompts: list[Prompt], keep: list[list[int]]) -> list[np.ndarray]:
    """Logits [2, V] of prefill and every step; the tokens are the same whatever they are."""
    runs = [model.prefill(prompt, kept) for prompt, kept in zip(prompts, keep, strict=True)]
    logits = [np.stack([run.logits for run in runs])]
    cache = model.batch([run.cache for run in runs], STEPS + 1)
    for step in range(STEPS):
        positions = [prompt.next_position + step for prompt in prompts]
        result, cache = model.append(cache, [[7 + step], [9 + step]], positions)
        logits.append(result.copy())
    return logits
