"""A module `tensorrt` that moves data: it builds plans that name their graph, and ONNX Runtime runs that for it.

Device memory is the stand-in driver's, which has it from `malloc`. What MISCOMPILED names comes out wrong, as FP16
products that share an input do in TensorRT from 10.13 on, unless the building process was told not to fuse them.
"""

import ctypes
import json
import os
from enum import Enum, IntEnum
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime

__version__ = os.environ.get("STANDIN_VERSION", "10.3.0")

_TYPES = {
    "tensor(float)": ("FLOAT", np.float32),
    "tensor(float16)": ("HALF", np.float16),
    "tensor(int64)": ("INT64", np.int64),
}
_ALIGNMENT, _ACTIVATIONS = 256, 4096


class ILogger:
    """What a logger derives from."""

    Severity = IntEnum("Severity", {"ERROR": 1, "WARNING": 2, "INFO": 3})
    ERROR, WARNING, INFO = Severity.ERROR, Severity.WARNING, Severity.INFO


class LayerType(Enum):
    """Of no layer here."""

    PLUGIN_V3 = 1


class TensorIOMode(Enum):
    """As TensorRT's."""

    INPUT = 1
    OUTPUT = 2


class TensorLocation(Enum):
    """As TensorRT's."""

    DEVICE = 0
    HOST = 1


class ExecutionContextAllocationStrategy(Enum):
    """As TensorRT's."""

    STATIC = 0
    USER_MANAGED = 2


NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)
ProfilingVerbosity = SimpleNamespace(DETAILED=2)
BuilderFlag = SimpleNamespace(TF32=1)


class _Network:
    """It shows no inputs, so that nobody has to read the graph before it is run."""

    num_layers = num_inputs = 0
    plan: dict[str, Any]


class OnnxParser:
    """Notes where the graph lies, and whether it will come out wrong."""

    def __init__(self, network: _Network, log: Any) -> None:
        self._network = network

    def parse(self, model: bytes, beside: str) -> bool:
        named = os.environ.get("MISCOMPILED", "none") in beside
        wrong = named and "fc_h_fusion=off" not in os.environ.get("__LUNOWUD", "")
        reason = os.environ.get("MISCOMPILED_AS", "rolled") if wrong else ""
        self._network.plan = {"onnx": beside, "wrong": reason}
        return True


class Builder:
    """Its plan says what the parser noted."""

    def __init__(self, log: Any) -> None: ...

    def create_network(self, flags: int) -> _Network:
        assert flags == 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED
        return _Network()

    def create_builder_config(self) -> Any:
        profiles: list[Any] = []
        return SimpleNamespace(clear_flag=lambda _: None, add_optimization_profile=profiles.append, profiles=profiles)

    def create_optimization_profile(self) -> Any:
        return None

    def build_serialized_network(self, network: _Network, config: Any) -> bytes:
        return json.dumps({**network.plan, "profiles": len(config.profiles)}).encode()


class Runtime:
    """Loads what the builder writes."""

    engine_host_code_allowed = False

    def __init__(self, log: Any) -> None:
        self._log = log

    def deserialize_cuda_engine(self, plan: Any) -> "_Engine | None":
        found = json.loads(bytes(plan))
        if found["wrong"] == "unloadable":
            self._log.log(ILogger.ERROR, "magicTag assertion failed\nmore of it")
            return None
        return _Engine(self._log, found)


class _Engine:
    device_memory_size_v2 = _ACTIVATIONS

    def __init__(self, log: Any, plan: dict[str, Any]) -> None:
        self.log, self.plan = log, plan
        self.session = onnxruntime.InferenceSession(plan["onnx"], providers=["CPUExecutionProvider"])
        self.inputs = {one.name: one for one in self.session.get_inputs()}
        self.outputs = {one.name: one for one in self.session.get_outputs()}
        self.tensors = {**self.inputs, **self.outputs}
        self.num_io_tensors = len(self.tensors)
        self.get_tensor_name = [*self.tensors].__getitem__

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=_TYPES[self.tensors[name].type][0])

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.HOST if name == "num_keep" else TensorLocation.DEVICE

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(size if isinstance(size, int) else -1 for size in self.tensors[name].shape)

    def create_execution_context(self, strategy: ExecutionContextAllocationStrategy) -> "_Context":
        assert strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        return _Context(self)


class _Context:
    def __init__(self, engine: _Engine) -> None:
        self._engine = engine
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._profile, self._memory = False, 0

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self._profile = 0 <= index < self._engine.plan["profiles"] and stream != 0
        self._shapes.clear()
        return self._profile

    def set_device_memory(self, address: int, num_bytes: int) -> None:
        assert address % _ALIGNMENT == 0 and num_bytes >= _ACTIVATIONS
        self._memory = address

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        declared = self._engine.inputs[name].shape
        self._shapes[name] = shape
        fits = all(isinstance(want, str) or want == size for want, size in zip(declared, shape, strict=True))
        return self._profile and fits

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return address % _ALIGNMENT == 0

    def infer_shapes(self) -> list[str]:
        fixed = {name for name, one in self._engine.inputs.items() if all(isinstance(n, int) for n in one.shape)}
        given = self._shapes.keys() | fixed
        return [name for name in self._engine.inputs if name not in given or name not in self._addresses]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._engine.get_tensor_shape(name)

    def execute_async_v3(self, stream: int) -> bool:
        assert self._memory and stream
        engine, wrong = self._engine, self._engine.plan["wrong"]
        if wrong == "crash":
            os.abort()
        feed: dict[str, Any] = {}
        for name, entry in engine.inputs.items():
            shape, dtype = self._shapes.get(name, entry.shape), np.dtype(_TYPES[entry.type][1])
            data = ctypes.string_at(self._addresses[name], int(np.prod(shape)) * dtype.itemsize)
            feed[name] = np.frombuffer(data, dtype).reshape(shape)
        names = [*engine.outputs]
        for name, found in zip(names, engine.session.run(names, feed), strict=True):
            if (given := _miscompiled(name, found, wrong)) is not None:
                ctypes.memmove(self._addresses[name], given.tobytes(), given.nbytes)
        return True


def _miscompiled(name: str, found: Any, wrong: str) -> Any:
    """What an output is in an engine that is wrong in this way; None where nothing is written."""
    if found.dtype == np.int64:
        return np.arange(found.size).reshape(found.shape) if wrong == "others" else found
    if wrong == "unwritten" and name == "logits":
        return None
    if wrong == "nan":
        return np.full_like(found, np.nan)
    return {"rolled": np.roll(found, 1), "scaled": (found * 1.1).astype(found.dtype)}.get(wrong, found)
