"""A stand-in for TensorRT over the stand-in for the driver, and bundles whose plans it takes.

It computes nothing, and refuses what TensorRT refuses. Engines are those that our builder makes: they want the memory
of their activations from outside.
"""

import ctypes
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir

from capa_export.base.precision import Precision
from capa_export.bundle.store import Bundle, files_under
from capa_export.config.recipe import load_recipe
from capa_export.export.graphs import write_onnx
from capa_export.graph.contract import CACHE_ROWS, counted_in_blocks
from capa_export.model.sidecars import copy_sidecars
from capa_export.model.source import Source
from capa_export.passes.cache_blocks import CacheBlocksPass
from capa_export.passes.join_decode import JoinDecodePass
from capa_export.selectors.selector import SelectorChoice
from capa_export.trt.graphs import GRAPHS as ENGINES
from capa_export.trt.graphs import JOINED, served_graphs
from tests.fake_driver import FakeDriver
from tests.recorded import record
from tests.trt.moving_tensorrt import ExecutionContextAllocationStrategy as Strategy
from tests.trt.moving_tensorrt import ILogger, TensorIOMode, TensorLocation

__all__ = ["GRAPHS", "PRUNE_LAYER", "FakeTensorRT", "write_bundle"]

GRAPHS = {"visual/visual": "visual/model.onnx", "llm/prefill": "llm/prefill.onnx", "llm/decode": "llm/decode.onnx"}
PRUNE_LAYER = 2
_LIMITS = {
    **dict.fromkeys(("frames", "rows", "cols"), (1, 64)),
    **dict.fromkeys(("sequence", "text", "past", "past_kept_0"), (1, 600)),
    "num_keep": (0, 256),
    "batch": (1, 4),
    "step": (1, 1),
}

_ACTIVATIONS = {"visual/visual": 3000, "llm/prefill": 2000, "llm/decode": 1000, "llm/decoder": 2000}
"""Bytes that an engine needs between inputs and outputs."""
_ITEM_BYTES = {"FLOAT": 4, "HALF": 2, "BF16": 2, "INT64": 8}
_ALIGNMENT = 256


class FakeTensorRT:
    """A module `tensorrt`, or `tensorrt_rtx`, whose plans are what `write_bundle` writes."""

    __name__ = "tensorrt_rtx"
    __version__ = "9.8.7"
    ILogger, TensorIOMode, TensorLocation = ILogger, TensorIOMode, TensorLocation
    ExecutionContextAllocationStrategy = Strategy

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
                logger.log(ILogger.ERROR, self.refuses)
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
        self.strategy, self.cache = Strategy.STATIC, None
        self.dynamic_shapes_kernel_specialization_strategy = "lazy"

    def set_execution_context_allocation_strategy(self, strategy: Strategy = Strategy.STATIC) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> FakeRuntimeCache:
        return FakeRuntimeCache()

    def set_runtime_cache(self, cache: FakeRuntimeCache) -> bool:
        self.cache = cache
        return True


class FakeEngine:
    """An ICudaEngine."""

    def __init__(self, trt: FakeTensorRT, logger: Any, plan: dict[str, Any]) -> None:
        self.trt, self.logger, self.plan, self.tensors = trt, logger, plan, plan["tensors"]
        self.device_memory_size_v2, self.num_optimization_profiles = plan["activations"], plan["profiles"]
        self.names = list(self.tensors)
        self.num_io_tensors = len(self.names)
        self.get_tensor_name = self.names.__getitem__
        self.num_contexts = 0
        if not hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):
            self.create_runtime_config = None

    def log(self, message: str) -> None:
        self.logger.log(ILogger.ERROR, message)

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=self.tensors[name]["dtype"])

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if self.tensors[name]["input"] else TensorIOMode.OUTPUT

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation(self.tensors[name]["host"])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(size if isinstance(size, int) else -1 for size in self.tensors[name]["shape"])

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[list[int]]:
        return self.tensors[name]["limits"][profile]

    def get_tensor_profile_values(self, profile: int, name: str) -> list[list[int]]:
        return self.tensors[name]["limits"][profile]

    def create_runtime_config(self) -> FakeConfig:
        return FakeConfig()

    def create_execution_context(self, choice: Any = Strategy.STATIC) -> "FakeContext | None":
        assert isinstance(choice, Strategy | FakeConfig), "no such overload"
        if self.trt.refuses_context:
            self.log(self.trt.refuses_context)
            return None
        if (choice if isinstance(choice, Strategy) else choice.strategy) != Strategy.USER_MANAGED:
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
            least, _, most = tensor["limits"][self.active_optimization_profile]
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
            if (-1 in self.engine.get_tensor_shape(name) and name not in self.shapes)
            or (tensor["host"] and name not in self.addresses)
        ]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        # What TensorRT cannot tell from the inputs is -1.
        return self.shapes.get(name, self.engine.get_tensor_shape(name))

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
            least, _, most = entry["limits"][self.active_optimization_profile]
            if not all(a <= n <= b for a, n, b in zip(least, values, most, strict=True)):
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


def write_bundle(
    source: Source,
    folder: Path,
    *,
    precision: Precision = "fp16",
    external_weights: bool = False,
    joined: bool = False,
    selector: str | None = None,
) -> Bundle:
    """A bundle with real ONNX files, and plans of theirs for FakeTensorRT; one may be prefill and decode."""
    selectors = {} if selector is None else {PRUNE_LAYER: SelectorChoice(selector)}
    write_onnx(source, precision, folder / "onnx", prune_layers=(PRUNE_LAYER,), scales={}, selectors=selectors)
    copy_sidecars(source.checkpoint, folder / "onnx")
    served = served_graphs(JOINED if joined else ENGINES)
    for name, graphs in served.items():
        _write_engine(folder / "onnx", graphs, folder / "engines/rtx" / f"{name}.engine", name, external_weights)
    recipe = load_recipe("qwen25vl").model_dump(mode="json")
    recipe = {**recipe, "prune": {"schedule": [{"layer": PRUNE_LAYER, "ratio": 0.75}]}}
    files = files_under(folder, "onnx")
    record(folder, "export", files, entries={"recipe": recipe}, result={"precision": precision})
    result = {
        "runtime": "tensorrt-rtx",
        "compute_capabilities": ["8.6", "8.9"],
        "plugins": {"kind": "none", "library_sha256": None},
        "engines": {
            name: {"onnx": graphs[0], "serves": graphs, "runtime": FakeTensorRT.__version__}
            for name, graphs in served.items()
        },
    }
    return record(folder, "engine/rtx", files_under(folder, "engines"), result=result)


def _limits(size: int | str, *, step: bool | None) -> Any:
    """Of a size, in prefill and in a step of an engine that is both."""
    length = counted_in_blocks(str(size))
    if step is not None and isinstance(size, str) and (length is None) == step:
        return 1, 1
    return _LIMITS.get(str(size), (size, size)) if length is None else [-(-n // CACHE_ROWS) for n in _LIMITS[length]]


def _write_engine(onnx: Path, served: Sequence[str], engine: Path, name: str, external_weights: bool) -> None:  # noqa: FBT001
    model = ir.load(onnx / served[0])
    (JoinDecodePass() if len(served) > 1 else CacheBlocksPass())(model)
    steps = (False, True) if len(served) > 1 else (None,)
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
        ranges = [
            [((0, 0) if step else _LIMITS["num_keep"]) if host else _limits(size, step=step) for size in shape]
            for step in steps
        ]
        tensors[value.name] = {
            "dtype": {"FLOAT16": "HALF", "BFLOAT16": "BF16"}.get(value.dtype.name, value.dtype.name),
            "shape": shape,
            "input": not value.is_graph_output(),
            "host": host,
            "limits": [[[least for least, _ in ends], [], [most for _, most in ends]] for ends in ranges],
        }
    engine.parent.mkdir(parents=True, exist_ok=True)
    plan = {"name": name, "tensors": tensors, "activations": _ACTIVATIONS[name], "profiles": len(served)}
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
