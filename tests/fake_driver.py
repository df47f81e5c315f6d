"""Stand-ins for the CUDA driver and for TensorRT: they keep what they are asked, and refuse what those refuse.

They compute nothing. Every call must have as many arguments as the real driver's and come from a thread in which a
context is current; every copy and every tensor must lie within memory that is allocated at that moment; and while a
stream is captured, nothing may be allocated, freed, loaded or waited for, and no host memory be copied that is not
pinned. Engines are those that our builder makes: they want the memory of their activations from outside.
"""

import ctypes
import inspect
import json
import threading
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
from cuda.bindings import driver as real

from capa_export.base.precision import Precision
from capa_export.bundle.store import Bundle, files_under
from capa_export.config.recipe import load_recipe
from capa_export.export.graphs import write_onnx
from capa_export.graph.contract import CACHE_ROWS, counted_in_blocks
from capa_export.model.sidecars import copy_sidecars
from capa_export.model.source import Source
from capa_export.passes.cache_blocks import CacheBlocksPass
from capa_export.selectors.selector import SelectorChoice
from tests.recorded import record

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

_ACTIVATIONS = {"visual/visual": 3000, "llm/prefill": 2000, "llm/decode": 1000}
"""Bytes that an engine needs between inputs and outputs."""

_OK = real.CUresult.CUDA_SUCCESS
_ADDRESS_STEP = 1 << 40
_ALIGNMENT = 256
_WITHOUT_CONTEXT = (
    "cuInit",
    "cuDeviceGet",
    "cuDriverGetVersion",
    "cuDeviceTotalMem",
    "cuDevicePrimaryCtxRetain",
    "cuCtx",
)
_NOT_IN_CAPTURE = ("cuMemAlloc", "cuMemFree", "cuMemHostAlloc", "cuModuleLoad", "cuStreamSynchronize")
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
        self.pinned: dict[int, np.ndarray] = {}
        """Host memory by the address that it was given out with."""
        self.current: set[int] = set()
        """Threads in which the context is current."""
        self.capturing: list[tuple[Any, ...]] | None = None
        self.invalidated = False
        """Whether something came between that a capture does not survive."""
        self.graphs: dict[str, list[tuple[Any, ...]]] = {}
        self._next = _ADDRESS_STEP

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            return getattr(real, name)
        implementation = getattr(self, f"_{name}", None)
        signature = inspect.signature(getattr(real, name))

        def function(*args: Any) -> tuple[Any, ...]:
            signature.bind(*args)
            captured = self.capturing is not None and name.endswith("Async")
            self.record(name, *args)
            if status := self.fails.get(name) or self.refusal(name):
                # As the bindings do; functions that return nothing have the status alone.
                returns = any(part in name for part in ("Create", "Instantiate", "Alloc"))
                return (status, None) if returns else (status,)
            if captured:
                # It runs when the graph does.
                return (_OK,)
            return (_OK, *(implementation(*args) if implementation else ()))

        return function

    def refusal(self, name: str) -> Any:
        """The status of a call that the driver would refuse at this moment."""
        if not name.startswith(_WITHOUT_CONTEXT) and threading.get_ident() not in self.current:
            return real.CUresult.CUDA_ERROR_INVALID_CONTEXT
        if self.capturing is not None and name.startswith(_NOT_IN_CAPTURE):
            self.invalidated = True
            return real.CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
        return None

    def is_pinned(self, address: int, num_bytes: int) -> bool:
        return any(start <= address and address + num_bytes <= start + len(one) for start, one in self.pinned.items())

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

    def _cuCtxSetCurrent(self, context: str) -> tuple[()]:
        assert context == "context"
        self.current.add(threading.get_ident())
        return ()

    def _cuMemHostAlloc(self, num_bytes: int, flags: int) -> tuple[int]:
        room = np.zeros(num_bytes, np.uint8)
        self.pinned[room.ctypes.data] = room
        return (room.ctypes.data,)

    def _cuMemFreeHost(self, address: int) -> tuple[()]:
        del self.pinned[address]
        return ()

    def _cuStreamCreate(self, flags: int) -> tuple[int]:
        return (77,)

    def cuMemAlloc(self, num_bytes: int) -> tuple[Any, ...]:
        self.record("cuMemAlloc", num_bytes)
        if status := self.refusal("cuMemAlloc"):
            return status, None
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

    def _cuMemcpy3DAsync(self, copy: Any, stream: Any) -> tuple[()]:
        sides = ((copy.srcDevice, copy.srcPitch, copy.srcHeight), (copy.dstDevice, copy.dstPitch, copy.dstHeight))
        for address, pitch, height in sides:
            assert copy.WidthInBytes <= pitch and copy.Height <= height
            rows = (copy.Depth - 1) * height + copy.Height - 1
            self.check(int(address), rows * pitch + copy.WidthInBytes)
        return ()

    def _cuStreamBeginCapture(self, stream: Any, mode: Any) -> tuple[()]:
        assert self.capturing is None
        self.capturing, self.invalidated = [], False
        return ()

    def cuStreamEndCapture(self, stream: Any) -> tuple[Any, ...]:
        self.record("cuStreamEndCapture", stream)
        graph = f"graph{len(self.graphs)}"
        assert self.capturing is not None
        captured, self.capturing = self.capturing, None
        lost = real.CUresult.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED if self.invalidated else _OK
        if failure := self.fails.get("cuStreamEndCapture", lost):
            return failure, None
        for name, *args in captured:
            host = {"cuMemcpyHtoDAsync": 1, "cuMemcpyDtoHAsync": 0}.get(name)
            assert host is None or self.is_pinned(args[host], args[2]), f"{name} of memory that is not pinned"
        self.graphs[graph] = captured
        return _OK, graph

    def _cuGraphInstantiate(self, graph: str, flags: int) -> tuple[str]:
        return (graph,)

    def _cuGraphLaunch(self, graph: str, stream: Any) -> tuple[()]:
        for name, *args in self.graphs[graph]:
            if name == "executeAsync":
                self.execute(*args)
            else:
                getattr(self, f"_{name}")(*args)
        return ()

    def execute(self, engine: str, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        """Compute what an engine does; nothing here."""


class _Severity(IntEnum):
    ERROR = 1
    INFO = 3


class _Location(IntEnum):
    DEVICE = 0
    HOST = 1


class _Mode(IntEnum):
    INPUT = 1
    OUTPUT = 2


class _Strategy(IntEnum):
    STATIC = 0
    ON_PROFILE_CHANGE = 1
    USER_MANAGED = 2


class FakeTensorRT:
    """A module `tensorrt`, or `tensorrt_rtx`, whose plans are what `write_bundle` writes."""

    __name__ = "tensorrt_rtx"
    __version__ = "9.8.7"
    TensorIOMode, TensorLocation, ExecutionContextAllocationStrategy = _Mode, _Location, _Strategy

    class ILogger:
        """What a logger derives from."""

        ERROR, INFO = _Severity.ERROR, _Severity.INFO

    def __init__(self, driver: FakeDriver, *, rtx: bool = True) -> None:
        self.driver = driver
        self.refuses = ""
        """What the logger is told instead of an engine being loaded."""
        self.refuses_context = ""
        """What it is told instead of a context being made."""
        self.capturable = True
        self.fails_while_capturing = False
        self.runtime: Any = None
        self.contexts: dict[str, FakeContext] = {}
        """The newest of each engine."""
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


class FakeRuntimeCache:
    """An IRuntimeCache: the shapes that kernels were compiled for."""

    GPU = "Fake"

    def __init__(self) -> None:
        self.compiled: list[Any] = []

    def deserialize(self, blob: bytes) -> bool:
        try:
            stored = json.loads(blob)
        except ValueError:
            return False
        if stored["gpu"] == self.GPU:
            self.compiled = stored["compiled"]
        return stored["gpu"] == self.GPU

    def serialize(self) -> bytes:
        return json.dumps({"gpu": self.GPU, "compiled": self.compiled}).encode()


class FakeConfig:
    """An IRuntimeConfig of TensorRT-RTX."""

    __slots__ = ("cache", "dynamic_shapes_kernel_specialization_strategy", "strategy")

    def __init__(self) -> None:
        self.strategy, self.cache = _Strategy.STATIC, None
        self.dynamic_shapes_kernel_specialization_strategy = "lazy"

    def set_execution_context_allocation_strategy(self, strategy: _Strategy = _Strategy.STATIC) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> FakeRuntimeCache:
        return FakeRuntimeCache()

    def set_runtime_cache(self, cache: FakeRuntimeCache) -> bool:
        self.cache = cache
        return True


class FakeEngine:
    """An ICudaEngine."""

    num_optimization_profiles = 1

    def __init__(self, trt: FakeTensorRT, logger: Any, plan: dict[str, Any]) -> None:
        self.trt, self.logger, self.plan, self.tensors = trt, logger, plan, plan["tensors"]
        self.device_memory_size_v2 = plan["activations"]
        self.names = list(self.tensors)
        self.num_io_tensors = len(self.names)
        self.get_tensor_name = self.names.__getitem__
        self.num_contexts = 0
        if not hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):
            self.create_runtime_config = None

    def log(self, message: str) -> None:
        self.logger.log(_Severity.ERROR, message)

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

    def create_runtime_config(self) -> FakeConfig:
        return FakeConfig()

    def create_execution_context(self, choice: Any = _Strategy.STATIC) -> "FakeContext | None":
        assert isinstance(choice, _Strategy | FakeConfig), "no such overload"
        if self.trt.refuses_context:
            self.log(self.trt.refuses_context)
            return None
        if (choice if isinstance(choice, _Strategy) else choice.strategy) != _Strategy.USER_MANAGED:
            self.log(
                "Engine was built with BuilderFlag::kREQUIRE_USER_ALLOCATION. Execution context creation requires "
                "ExecutionContextAllocationStrategy::kUSER_MANAGED allocation strategy."
            )
            return None
        context = FakeContext(self, choice if isinstance(choice, FakeConfig) else None, first=self.num_contexts == 0)
        self.num_contexts += 1
        self.trt.contexts[self.plan["name"]] = context
        return context


class FakeContext:
    """An IExecutionContext. A setter that TensorRT refuses returns False, and the logger hears why."""

    def __init__(self, engine: FakeEngine, config: FakeConfig | None, *, first: bool) -> None:
        self.engine, self.config = engine, config
        self.active_optimization_profile = 0 if first else -1
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.memory: tuple[int, int] | None = None
        self.ran: set[str] = set()
        """Shapes that it is prepared for."""
        if config is not None:
            self.is_stream_capturable = lambda stream: engine.trt.capturable

    def _refuse(self, message: str) -> bool:
        self.engine.log(message)
        return False

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        assert self.engine.trt.driver.capturing is None
        if not 0 <= index < self.engine.num_optimization_profiles:
            return self._refuse("there is no such profile")
        # What was set was set within the other.
        self.active_optimization_profile, self.shapes = index, {}
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        self.engine.trt.driver.check(memory, size)
        if memory % _ALIGNMENT or size < self.engine.device_memory_size_v2:
            self.engine.log("setDeviceMemoryV2: too little, or not aligned")
            return
        self.memory = memory, size

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        tensor = self.engine.tensors[name]
        if self.active_optimization_profile < 0:
            return self._refuse("no optimization profile is set")
        if not tensor["input"]:
            return self._refuse(f"{name} is no input")
        if not tensor["host"]:
            least, _, most = tensor["limits"]
            if len(shape) != len(least) or not all(a <= n <= b for a, n, b in zip(least, shape, most, strict=True)):
                return self._refuse(f"{name}: {shape} does not satisfy the profile")
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        driver = self.engine.trt.driver
        if address % _ALIGNMENT:
            return self._refuse(f"{name}: {address:#x} is not aligned")
        on_device = any(start <= address <= start + size for start, size in driver.buffers.items())
        assert on_device != self.engine.tensors[name]["host"], f"{name} is in the wrong memory"
        self.addresses[name] = address
        return True

    def infer_shapes(self) -> list[str]:
        inputs = {name: tensor for name, tensor in self.engine.tensors.items() if tensor["input"]}
        return [
            name
            for name, tensor in inputs.items()
            if (tensor["limits"][0] != tensor["limits"][2] and name not in self.shapes)
            or (tensor["host"] and name not in self.addresses)
        ]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        tensor = self.engine.tensors[name]
        # What TensorRT cannot tell from the inputs is -1.
        return self.shapes.get(name, tuple(size if isinstance(size, int) else -1 for size in tensor["shape"]))

    def execute_async_v3(self, stream: int) -> bool:
        driver, name = self.engine.trt.driver, self.engine.plan["name"]
        if missing := self.infer_shapes():
            return self._refuse(f"shapes of {missing} are not known")
        if self.memory is None:
            return self._refuse("IExecutionContext::setDeviceMemoryV2 should be called before enqueue/execute.")
        driver.check(*self.memory)
        driver.record("executeAsync", name, dict(self.shapes), dict(self.addresses))
        for tensor, entry in self.engine.tensors.items():
            if tensor not in self.addresses:
                return self._refuse(f"{tensor} has no address")
            shape = self.shapes.get(tensor, [size for size in entry["shape"] if isinstance(size, int)])
            num_bytes = int(np.prod(shape)) * _ITEM_BYTES[entry["dtype"]]
            if not entry["host"]:
                driver.check(self.addresses[tensor], num_bytes)
                continue
            values = (ctypes.c_int64 * (num_bytes // 8)).from_address(self.addresses[tensor])
            if not all(a <= n <= b for a, n, b in zip(entry["limits"][0], values, entry["limits"][2], strict=True)):
                return self._refuse(f"{tensor}: {list(values)} does not satisfy the profile")
        shapes = str(sorted(self.shapes.items()))
        if driver.capturing is not None and (self.engine.trt.fails_while_capturing or shapes not in self.ran):
            return self._refuse("not while a stream is captured")
        self.ran.add(shapes)
        if driver.capturing is None:
            driver.execute(name, dict(self.shapes), dict(self.addresses))
        if self.config is not None and self.config.cache is not None and shapes not in self.config.cache.compiled:
            self.config.cache.compiled.append(shapes)
        return True


def has_driver() -> bool:
    """Whether this machine has the real one."""
    try:
        real.cuInit(0)
    except RuntimeError:
        return False
    return True


def write_bundle(
    source: Source,
    folder: Path,
    *,
    precision: Precision = "fp16",
    external_weights: bool = False,
    selector: str | None = None,
) -> Bundle:
    """A bundle with real ONNX files, and plans of theirs for FakeTensorRT."""
    selectors = {} if selector is None else {PRUNE_LAYER: SelectorChoice(selector)}
    write_onnx(source, precision, folder / "onnx", prune_layers=(PRUNE_LAYER,), scales={}, selectors=selectors)
    copy_sidecars(source.checkpoint, folder / "onnx")
    for name, onnx in GRAPHS.items():
        _write_engine(folder / "onnx" / onnx, folder / "engines/rtx" / f"{name}.engine", name, external_weights)
    recipe = load_recipe("qwen25vl").model_dump(mode="json")
    recipe = {**recipe, "prune": {"schedule": [{"layer": PRUNE_LAYER, "ratio": 0.75}]}}
    files = files_under(folder, "onnx")
    record(folder, "export", files, entries={"recipe": recipe}, result={"precision": precision})
    result = {
        "runtime": "tensorrt-rtx",
        "compute_capabilities": ["8.6", "8.9"],
        "plugins": {"kind": "none", "library_sha256": None},
        "engines": {name: {"onnx": onnx, "runtime": FakeTensorRT.__version__} for name, onnx in GRAPHS.items()},
    }
    return record(folder, "engine/rtx", files_under(folder, "engines"), result=result)


def _limits(size: int | str) -> Any:
    length = counted_in_blocks(str(size))
    return _LIMITS.get(str(size), (size, size)) if length is None else [-(-n // CACHE_ROWS) for n in _LIMITS[length]]


def _write_engine(onnx: Path, engine: Path, name: str, external_weights: bool) -> None:  # noqa: FBT001
    model = ir.load(onnx)
    CacheBlocksPass()(model)
    graph = model.graph
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
        ranges = [_LIMITS["num_keep"] if host else _limits(size) for size in shape]
        tensors[value.name] = {
            "dtype": {"FLOAT16": "HALF", "BFLOAT16": "BF16"}.get(value.dtype.name, value.dtype.name),
            "shape": shape,
            "input": not value.is_graph_output(),
            "host": host,
            "limits": [[least for least, _ in ranges], [], [most for _, most in ranges]],
        }
    engine.parent.mkdir(parents=True, exist_ok=True)
    plan = {"name": name, "tensors": tensors, "activations": _ACTIVATIONS[name]}
    engine.write_text(json.dumps(plan), encoding="utf-8")
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
