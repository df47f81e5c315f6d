"""Stand-ins for the CUDA driver and for TensorRT: they keep what they are asked and compute nothing.

Every call must have as many arguments as the real driver's, and every copy and every tensor must lie within memory that
is allocated at that moment.
"""

import ctypes
import inspect
import json
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
from cuda.bindings import driver as real

from capa_export.bundle.store import Bundle
from capa_export.config.recipe import load_recipe
from capa_export.export.graphs import write_onnx
from capa_export.model.sidecars import copy_sidecars
from capa_export.model.source import Source

__all__ = ["GRAPHS", "PRUNE_LAYER", "FakeDriver", "FakeTensorRT", "has_driver", "write_bundle"]

GRAPHS = {"visual/visual": "visual/model.onnx", "llm/prefill": "llm/prefill.onnx", "llm/decode": "llm/decode.onnx"}
PRUNE_LAYER = 2
_LIMITS = {
    **dict.fromkeys(("frames", "rows", "cols"), (1, 64)),
    **dict.fromkeys(("sequence", "text", "past", "past_kept_0"), (1, 600)),
    "num_keep": (0, 256),
    "batch": (1, 4),
    "step": (1, 1),
}

_OK = real.CUresult.CUDA_SUCCESS
_ADDRESS_STEP = 1 << 40
_ITEM_BYTES = {"FLOAT": 4, "HALF": 2, "BF16": 2, "INT64": 8}


class FakeDriver:
    """The functions of `cuda.bindings.driver` that are used, on a GPU of `memory` bytes."""

    def __init__(self, *, capability: tuple[int, int] = (8, 9), memory: int = 1 << 30) -> None:
        self.capability, self.memory = capability, memory
        self.calls: list[tuple[Any, ...]] = []
        """Name and arguments, in order; what TensorRT does is among them."""
        self.buffers: dict[int, int] = {}
        """Bytes by address of what is allocated."""
        self.fails: dict[str, Any] = {}
        """Status by function, where it is not success."""
        self.capturing: list[tuple[Any, ...]] | None = None
        self.graphs: dict[str, list[tuple[Any, ...]]] = {}
        self._next = _ADDRESS_STEP

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            return getattr(real, name)
        implementation = getattr(self, f"_{name}", None)
        signature = inspect.signature(getattr(real, name))

        def function(*args: Any) -> tuple[Any, ...]:
            signature.bind(*args)
            self.record(name, *args)
            if name in self.fails:
                # As the bindings do; functions that return nothing have the status alone.
                return (self.fails[name], None) if "Create" in name or "Instantiate" in name else (self.fails[name],)
            return (_OK, *(implementation(*args) if implementation else ()))

        return function

    def record(self, name: str, *args: Any) -> None:
        call = (name, *args)
        self.calls.append(call)
        if self.capturing is not None and name.endswith("Async"):
            self.capturing.append(call)

    def named(self, *names: str) -> list[tuple[Any, ...]]:
        return [call for call in self.calls if call[0] in names]

    def check(self, address: int, num_bytes: int) -> None:
        """That these bytes are allocated."""
        holders = [start for start, size in self.buffers.items() if start <= address <= start + size]
        assert holders, f"{address:#x} is not allocated"
        assert address + num_bytes <= holders[0] + self.buffers[holders[0]], "past the end of a buffer"

    def _cuDeviceGetCount(self) -> tuple[int]:
        return (1,)

    def _cuDeviceGet(self, ordinal: int) -> tuple[int]:
        return (ordinal,)

    def _cuDeviceGetName(self, length: int, device: int) -> tuple[bytes]:
        return (b"Fake".ljust(length, b"\0"),)

    def _cuDeviceGetAttribute(self, attribute: Any, device: int) -> tuple[int]:
        return (self.capability["MINOR" in attribute.name],)

    def _cuDeviceTotalMem(self, device: int) -> tuple[int]:
        return (self.memory,)

    def _cuMemGetInfo(self) -> tuple[int, int]:
        return self.memory - sum(self.buffers.values()), self.memory

    def _cuDriverGetVersion(self) -> tuple[int]:
        return (13010,)

    def _cuDevicePrimaryCtxRetain(self, device: int) -> tuple[str]:
        return ("context",)

    def _cuStreamCreate(self, flags: int) -> tuple[int]:
        return (77,)

    def cuMemAlloc(self, num_bytes: int) -> tuple[Any, ...]:
        self.record("cuMemAlloc", num_bytes)
        if sum(self.buffers.values()) + num_bytes > self.memory:
            return real.CUresult.CUDA_ERROR_OUT_OF_MEMORY, None
        self._next += _ADDRESS_STEP
        self.buffers[self._next] = num_bytes
        return _OK, self._next

    def _cuMemFree(self, address: int) -> tuple[()]:
        del self.buffers[address]
        return ()

    def _cuMemcpyHtoDAsync(self, target: int, source: int, num_bytes: int, stream: Any) -> tuple[()]:
        self.check(target, num_bytes)
        return ()

    def _cuMemcpyDtoHAsync(self, target: int, source: int, num_bytes: int, stream: Any) -> tuple[()]:
        self.check(source, num_bytes)
        ctypes.memset(target, 0, num_bytes)
        return ()

    def _cuMemsetD8Async(self, address: int, value: int, num_bytes: int, stream: Any) -> tuple[()]:
        self.check(address, num_bytes)
        return ()

    def _cuMemcpy2DAsync(self, copy: Any, stream: Any) -> tuple[()]:
        for address, pitch in ((int(copy.srcDevice), copy.srcPitch), (int(copy.dstDevice), copy.dstPitch)):
            assert copy.WidthInBytes <= pitch
            self.check(address, (copy.Height - 1) * pitch + copy.WidthInBytes)
        return ()

    def _cuStreamBeginCapture(self, stream: Any, mode: Any) -> tuple[()]:
        self.capturing = []
        return ()

    def cuStreamEndCapture(self, stream: Any) -> tuple[Any, ...]:
        self.record("cuStreamEndCapture", stream)
        graph = f"graph{len(self.graphs)}"
        assert self.capturing is not None
        self.graphs[graph], self.capturing = self.capturing, None
        failure = self.fails.get("cuStreamEndCapture", _OK)
        return failure, None if failure else graph

    def _cuGraphInstantiate(self, graph: str, flags: int) -> tuple[str]:
        return (graph,)


class _Severity(IntEnum):
    ERROR = 1
    INFO = 3


class _Location(IntEnum):
    DEVICE = 0
    HOST = 1


class _Mode(IntEnum):
    INPUT = 1
    OUTPUT = 2


class FakeTensorRT:
    """A module `tensorrt`, or `tensorrt_rtx`, whose plans are what `write_bundle` writes."""

    __name__ = "tensorrt_rtx"
    __version__ = "9.8.7"
    TensorIOMode, TensorLocation = _Mode, _Location

    class ILogger:
        """What a logger derives from."""

        ERROR, INFO = _Severity.ERROR, _Severity.INFO

    def __init__(self, driver: FakeDriver, *, rtx: bool = True) -> None:
        self.driver = driver
        self.refuses = ""
        """What the logger is told instead of an engine being loaded."""
        self.capturable = True
        self.runtime: Any = None
        self.contexts: dict[str, FakeContext] = {}
        if rtx:
            self.DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager")

    def Runtime(self, logger: Any) -> Any:
        def deserialize(plan: Any) -> "FakeEngine | None":
            if self.refuses:
                logger.log(_Severity.ERROR, self.refuses)
                return None
            return FakeEngine(self, logger, json.loads(bytes(plan)))

        self.runtime = SimpleNamespace(deserialize_cuda_engine=deserialize, engine_host_code_allowed=False)
        return self.runtime


class FakeEngine:
    """An ICudaEngine."""

    device_memory_size_v2 = 1000

    def __init__(self, trt: FakeTensorRT, logger: Any, plan: dict[str, Any]) -> None:
        self.trt, self.logger, self.plan, self.tensors = trt, logger, plan, plan["tensors"]
        self.names = list(self.tensors)
        self.num_io_tensors = len(self.names)
        self.get_tensor_name = self.names.__getitem__

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=self.tensors[name]["dtype"])

    def get_tensor_mode(self, name: str) -> _Mode:
        return _Mode.INPUT if self.tensors[name]["input"] else _Mode.OUTPUT

    def get_tensor_location(self, name: str) -> _Location:
        return _Location(self.tensors[name]["host"])

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[list[int]]:
        return self.tensors[name]["limits"]

    def get_tensor_profile_values(self, profile: int, name: str) -> list[list[int]]:
        return self.tensors[name]["limits"]

    def create_runtime_config(self) -> Any:
        return SimpleNamespace()

    def create_execution_context(self, config: Any = None) -> "FakeContext":
        context = FakeContext(self, config)
        self.trt.contexts[self.plan["name"]] = context
        return context


class FakeContext:
    """An IExecutionContext."""

    def __init__(self, engine: FakeEngine, config: Any) -> None:
        self.engine, self.config = engine, config
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.fails_while_capturing = False
        if config is not None:
            self.is_stream_capturable = lambda stream: engine.trt.capturable

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        tensor = self.engine.tensors[name]
        # What TensorRT cannot tell from the inputs is -1.
        return self.shapes.get(name, tuple(size if isinstance(size, int) else -1 for size in tensor["shape"]))

    def execute_async_v3(self, stream: int) -> bool:
        driver, name = self.engine.trt.driver, self.engine.plan["name"]
        driver.record("executeAsync", name, dict(self.shapes), dict(self.addresses))
        for tensor, entry in self.engine.tensors.items():
            shape = self.shapes.get(tensor, [size for size in entry["shape"] if isinstance(size, int)])
            num_bytes = int(np.prod(shape)) * _ITEM_BYTES[entry["dtype"]]
            if not entry["host"]:
                driver.check(self.addresses[tensor], num_bytes)
        if driver.capturing is not None and self.fails_while_capturing:
            self.engine.logger.log(_Severity.ERROR, "not while a stream is captured")
            return False
        return True


def has_driver() -> bool:
    """Whether this machine has the real one."""
    try:
        real.cuInit(0)
    except RuntimeError:
        return False
    return True


def write_bundle(source: Source, folder: Path, *, external_weights: bool = False) -> Bundle:
    """A bundle with real ONNX files, and plans of theirs for FakeTensorRT."""
    write_onnx(source, "fp16", folder / "onnx", prune_layers=(PRUNE_LAYER,), scales={})
    copy_sidecars(source.checkpoint, folder / "onnx")
    for name, onnx in GRAPHS.items():
        _write_engine(folder / "onnx" / onnx, folder / "engines/rtx" / f"{name}.engine", name, external_weights)
    bundle = Bundle(folder)
    recipe = load_recipe("qwen25vl").model_dump(mode="json")
    bundle.update(recipe={**recipe, "prune": {"schedule": [{"layer": PRUNE_LAYER, "ratio": 0.75}]}})
    bundle.record("export", "key", bundle.files_under("onnx"), result={"precision": "fp16"})
    result = {
        "runtime": "tensorrt-rtx",
        "compute_capabilities": ["8.6", "8.9"],
        "plugins": {"kind": "none", "library_sha256": None},
        "engines": {name: {"onnx": onnx, "runtime": FakeTensorRT.__version__} for name, onnx in GRAPHS.items()},
    }
    bundle.record("engine/rtx", "key", bundle.files_under("engines"), result=result)
    return bundle


def _write_engine(onnx: Path, engine: Path, name: str, external_weights: bool) -> None:  # noqa: FBT001
    graph = ir.load(onnx).graph
    stored = {weight: value.const_value for weight, value in graph.initializers.items() if external_weights}
    table = {
        weight: tensor
        for weight, tensor in stored.items()
        if isinstance(tensor, ir.ExternalTensor) and len(tensor.shape) == 2
    }
    tensors: dict[str, Any] = {}
    for value in (*graph.inputs, *(graph.initializers[weight] for weight in table), *graph.outputs):
        assert value.shape is not None and value.dtype is not None and value.name is not None
        shape = [str(size.value) if isinstance(size, ir.SymbolicDim) else size for size in value.shape]
        host = value.name == "num_keep"
        ranges = [_LIMITS["num_keep"] if host else _LIMITS.get(str(size), (size, size)) for size in shape]
        tensors[value.name] = {
            "dtype": {"FLOAT16": "HALF", "BFLOAT16": "BF16"}.get(value.dtype.name, value.dtype.name),
            "shape": shape,
            "input": not value.is_graph_output(),
            "host": host,
            "limits": [[least for least, _ in ranges], [], [most for _, most in ranges]],
        }
    engine.parent.mkdir(parents=True, exist_ok=True)
    engine.write_text(json.dumps({"name": name, "tensors": tensors}), encoding="utf-8")
    if table:
        entries = {
            weight: {
                "file": str(tensor.path),
                "offset": tensor.offset or 0,
                "length": tensor.length,
                "dtype": tensor.dtype.name,
                "shape": list(tensor.shape.numpy()),
            }
            for weight, tensor in table.items()
        }
        engine.with_suffix(".weights.json").write_text(json.dumps(entries), encoding="utf-8")
