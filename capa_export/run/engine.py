"""Engines loaded for the GPU that is here, and the weights that they share."""

import json
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from capa_export.base.errors import CapaError, ExitCode
from capa_export.base.progress import say
from capa_export.bundle.store import ONNX, Bundle
from capa_export.graph.contract import CACHE_ROWS, NUM_KEEP, POSITION_IDS, counted_in_blocks
from capa_export.graph.functions import DOMAIN
from capa_export.kernels.cuda import Buffer, Gpu, Stream, enter_context, require_gpu
from capa_export.passes.cache_blocks import step_shapes
from capa_export.run.execution import Execution, KernelCache

__all__ = ["BuiltEngines", "DeviceWeights", "LoadedEngine", "TensorRTRuntime", "require_engines"]

_DTYPES: Mapping[str, Any] = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "INT64": np.int64,
    "INT32": np.int32,
    "BOOL": np.bool_,
}
_UPLOAD_BYTES = 16 << 20
_TOO_OLD = "CUDA driver version is insufficient"


@dataclass(frozen=True, kw_only=True, slots=True)
class BuiltEngines:
    """A bundle's engines for one target, and what runs them."""

    folder: Path
    onnx: Path
    """The bundle's `onnx` folder."""
    serving: Mapping[str, tuple[str, int]]
    """By ONNX file the name of the engine that serves it, and with which of its profiles."""
    plugins: Mapping[str, Any]
    """The plugins' entry in the engine stage's record."""
    trt: Any
    """The module `tensorrt_rtx` or `tensorrt`."""
    gpu: Gpu


def require_engines(bundle: Bundle, target: str) -> BuiltEngines:
    """The engines of a bundle for a target; cheap, so that whatever is in their way is said before anything is run.

    Raises:
        CapaError: they were not built, there is no GPU, or the engines are for another runtime or GPU.
    """
    result = bundle.stage(f"engine/{target}")["result"]
    folder = bundle.folder / "engines" / target
    gpu = require_gpu()
    if not result["engines"]:
        to_build = (
            f"{bundle.folder} --target {target}" if result.get("built") == "with-gpu" else f"{folder} --on-device"
        )
        raise CapaError(
            f"{folder}: is a kit whose engines were not built here: capa-export engine {to_build}", ExitCode.ENGINE
        )
    if "runtime" not in result:
        raise CapaError(f"{folder}: built by an older capa-export: build the engines again", ExitCode.ENGINE)
    runtime, module = result["runtime"], result["runtime"].replace("-", "_")
    try:
        trt = import_module(module)
    except ImportError as error:
        raise CapaError(f"{folder}: its engines need {runtime}, which is not installed", ExitCode.ENGINE) from error
    for name, entry in result["engines"].items():
        if entry["runtime"] != trt.__version__:
            raise CapaError(
                f"{folder / name}.engine: built by {runtime} {entry['runtime']}, and {trt.__version__} is installed; "
                "install that version, or build the engines again",
                ExitCode.ENGINE,
            )
    built_for = result["compute_capabilities"]
    if gpu.compute_capability not in built_for:
        raise CapaError(
            f"{folder}: its engines are for compute capability {', '.join(built_for)}, and {gpu.name} has "
            f"{gpu.compute_capability}; build them for a target that lists it",
            ExitCode.ENGINE,
        )
    return BuiltEngines(
        folder=folder,
        onnx=bundle.folder / ONNX,
        serving={
            # A kit counts its own files from beside its folder of graphs.
            graph.removeprefix(f"{ONNX}/"): (name, profile)
            for name, entry in result["engines"].items()
            for profile, graph in enumerate(entry.get("serves", [entry["onnx"]]))
        },
        plugins=result["plugins"],
        trt=trt,
        gpu=gpu,
    )


class TensorRTRuntime:
    """TensorRT, ready to load engines; keeps the reasons of its failures."""

    def __init__(self, built: BuiltEngines) -> None:
        self.built, self.trt = built, built.trt
        self._log = _logger(built.trt)
        self._runtime = built.trt.Runtime(self._log)
        self._engines: dict[Path, Any] = {}
        self._kernels: dict[Path, KernelCache] = {}
        self._load_plugins(built.plugins)

    def _load_plugins(self, plugins: Mapping[str, Any]) -> None:
        if plugins["kind"] == "python":
            _register_python_plugins(self.trt)
        elif plugins["kind"] == "native":
            # The library is in the engines, as what was hashed when they were built.
            self._runtime.engine_host_code_allowed = True

    def engine(self, path: Path) -> Any:
        """An ICudaEngine, loaded once."""
        if path not in self._engines:
            self._engines[path] = self._deserialize(path)
        return self._engines[path]

    def kernels(self, path: Path, config: Any) -> KernelCache | None:
        """The kernels compiled for an engine, which contexts of this configuration use; None if they cannot be kept."""
        if path not in self._kernels:
            self._kernels[path] = KernelCache(path, config.create_runtime_cache())
        kernels = self._kernels[path]
        return kernels if config.set_runtime_cache(kernels.cache) else None

    def _deserialize(self, path: Path) -> Any:
        """The file is mapped, not read into memory."""
        self.forget()
        enter_context()
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
                engine = self._runtime.deserialize_cuda_engine(plan)
        except (OSError, ValueError) as error:
            raise CapaError(f"{path}: not a readable engine ({error})", ExitCode.ENGINE) from error
        if engine is None:
            if any(_TOO_OLD in message for message in self._log.errors):
                raise CapaError(
                    f"the NVIDIA driver supports CUDA {self.built.gpu.cuda} and {self.trt.__name__} "
                    f"{self.trt.__version__} needs a newer one; update the driver"
                )
            raise self.failure(f"{path}: cannot be loaded; build the engines again")
        return engine

    def forget(self) -> None:
        """Drop errors that led to nothing."""
        self._log.errors.clear()

    def failure(self, what: str) -> CapaError:
        """An error with what TensorRT said first."""
        reason = next((line for message in self._log.errors for line in message.splitlines()), "it gave no reason")
        return CapaError(f"{what} ({self.trt.__name__}: {reason})", ExitCode.ENGINE)


@cache
def _register_python_plugins(trt: Any) -> None:
    """Once in a process, before an engine is loaded that has layers of theirs."""
    from capa_export.kernels.plugins.python_plugins import register

    register(trt)


@cache
def _logger(trt: Any) -> Any:
    """The logger of this process: TensorRT stays with the first it was given."""

    class Log(trt.ILogger):
        """Keeps the errors."""

        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(msg)
            elif severity == trt.ILogger.WARNING and msg.startswith(DOMAIN):
                # Of our plugins: that the driver compiles their kernels, which takes a while.
                say(f"warning: {msg}")

    return Log()


class DeviceWeights:
    """Weights that are inputs of engines, on the device once however many engines read them.

    Weights embedded in the engines are not among them: each engine has its own copy, and nothing is shared.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._buffers: dict[tuple[Path, int, int], Buffer] = {}

    @property
    def num_bytes(self) -> int:
        return sum(buffer.num_bytes for buffer in self._buffers.values())

    def of(self, engine: Path) -> dict[str, Buffer]:
        """The weight inputs of an engine by name; empty where the weights are embedded.

        Raises:
            CapaError: a file is missing or too short, or the GPU has no room.
        """
        table = engine.with_suffix(".weights.json")
        if not table.is_file():
            return {}
        entries = json.loads(table.read_text(encoding="utf-8"))
        return {name: self._uploaded(engine.parent, entry) for name, entry in entries.items()}

    def _uploaded(self, folder: Path, entry: Mapping[str, Any]) -> Buffer:
        key = (folder / entry["file"]).resolve(), entry["offset"], entry["length"]
        if key not in self._buffers:
            self._buffers[key] = self._upload(*key)
        return self._buffers[key]

    def _upload(self, path: Path, offset: int, length: int) -> Buffer:
        weight, block = Buffer(length), bytearray(min(length, _UPLOAD_BYTES))
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(offset)
                done = 0
                while done < length:
                    count = file.readinto(memoryview(block)[: length - done])
                    if not count:
                        raise CapaError(f"{path}: ends before byte {offset + length}; build the bundle again")
                    self._stream.upload(weight, np.frombuffer(block, np.uint8, count), at=done)
                    done += count
        except OSError as error:
            raise CapaError(f"{path}: {error.strerror}; build the bundle again") from error
        return weight


class LoadedEngine:
    """A loaded engine as what serves one graph, and the facts about its inputs and outputs."""

    def __init__(
        self, runtime: TensorRTRuntime, graph: str, weights: DeviceWeights, *, one_shape: bool = False
    ) -> None:
        """Load an engine and the weights it reads.

        Args:
            runtime: TensorRT.
            graph: that it serves, as `llm/prefill.onnx`.
            weights: on the device; what is missing is uploaded.
            one_shape: whether each execution will run many times in one shape, worth compiling kernels for it.

        Raises:
            CapaError: the engine does not load, or the GPU has no room.
        """
        built, trt = runtime.built, runtime.trt
        name, self.profile = built.serving[graph]
        self.path = built.folder / f"{name}.engine"
        self.runtime = runtime
        self._engine = runtime.engine(self.path)
        self._config = self._runtime_config(trt, one_shape=one_shape)
        self._shapes = step_shapes(ir.load(built.onnx / graph).graph)
        self.weights = weights.of(self.path)
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        self.dtypes = {name: _DTYPES[self._engine.get_tensor_dtype(name).name] for name in names}
        modes = {name: self._engine.get_tensor_mode(name) for name in names}
        inputs = [name for name in names if modes[name] == trt.TensorIOMode.INPUT and name not in self.weights]
        outputs = [name for name in names if modes[name] == trt.TensorIOMode.OUTPUT]
        self.inputs, self.outputs = ([name for name in some if name in self._shapes] for some in (inputs, outputs))
        self.blank_inputs, self.blank_outputs = (
            {name: self._least(name) for name in some if name not in self._shapes} for some in (inputs, outputs)
        )
        """Shapes of what the graph has not, where the engine serves another too: zeros, and what nobody reads."""
        self.on_host = {name for name in names if self._engine.get_tensor_location(name) == trt.TensorLocation.HOST}
        self.limits = self._limits()

    def _runtime_config(self, trt: Any, *, one_shape: bool) -> Any:
        """What contexts are created with; TensorRT takes the strategy of their memory alone."""
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self.kernels: KernelCache | None = None
        if not hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):
            return strategy
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        if one_shape:
            # TensorRT-RTX would compile them while a graph with its kernels for any shape is captured and replayed.
            config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        self.kernels = self.runtime.kernels(self.path, config)
        return config

    def execution(self, stream: Stream, activations: Buffer) -> Execution:
        """A new execution context.

        Args:
            stream: that it runs on.
            activations: memory of `activation_bytes` at least, which executions on one stream may share.

        Raises:
            CapaError: TensorRT makes none.
        """
        self.runtime.forget()
        enter_context()
        context = self._engine.create_execution_context(self._config)
        if context is None:
            raise self.failure("no execution context can be made")
        return Execution(self, context, stream, activations)

    def save_kernels(self) -> None:
        """Keep what was compiled for this GPU for the next process."""
        if self.kernels is not None:
            self.kernels.save()

    def failure(self, what: str) -> CapaError:
        """An error with what TensorRT said first."""
        return self.runtime.failure(f"{self.path}: {what}")

    def _least(self, name: str) -> tuple[int, ...]:
        return tuple(abs(size) for size in self._engine.get_tensor_shape(name))

    def bound_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """A shape as the engine takes it: where prefill and decode share one, the positions of a step have no batch."""
        rank = len(self._engine.get_tensor_shape(name))
        return shape if len(shape) == rank else (*shape[: rank - 1], prod(shape[rank - 1 :]))

    def _limits(self) -> dict[str, tuple[int, int]]:
        """Smallest and largest size of each symbolic dimension; lengths where it counts blocks.

        Raises:
            CapaError: the engine is of another graph.
        """
        limits: dict[str, tuple[int, int]] = {}
        for name in self.inputs:
            # There are as many positions as embeddings.
            if name not in self.on_host and name != POSITION_IDS:
                smallest, _, largest = self._engine.get_tensor_profile_shape(name, self.profile)
                if len(smallest) != len(self._shapes[name]):
                    raise CapaError(f"{self.path}: built by an older capa-export: build the engines again")
                for size, least, most in zip(self._shapes[name], smallest, largest, strict=True):
                    if isinstance(size, str) and (length := counted_in_blocks(size)) is not None:
                        limits[length] = (least - 1) * CACHE_ROWS + 1, most * CACHE_ROWS
                    elif isinstance(size, str):
                        limits[size] = least, most
        return limits

    @property
    def plan_bytes(self) -> int:
        return self.path.stat().st_size

    @property
    def activation_bytes(self) -> int:
        """Memory that an execution needs between inputs and outputs, at the largest shapes."""
        return self._engine.device_memory_size_v2

    def sizes(self, feed: Mapping[str, np.ndarray]) -> dict[str, int]:
        """Sizes of the symbolic dimensions, as arrays of some of the inputs show them."""
        dims = {name: zip(self._shapes[name], array.shape, strict=True) for name, array in feed.items()}
        return {size: length for pairs in dims.values() for size, length in pairs if isinstance(size, str)}

    def axis(self, name: str, axis: int) -> int | str:
        """Size of an axis: a number, or the name of a symbolic dimension."""
        return self._shapes[name][axis]

    def shape(self, name: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Shape of a tensor; a dimension that counts blocks is as large as the length in `sizes` takes."""

        def size_of(size: int | str) -> int:
            if isinstance(size, int):
                return size
            length = counted_in_blocks(size)
            return sizes[size] if length is None else -(-sizes[length] // CACHE_ROWS)

        return tuple(map(size_of, self._shapes[name]))

    def check(self, sizes: Mapping[str, int], num_keep: Sequence[int] = ()) -> None:
        """Refuse what the engine was not built for.

        Raises:
            CapaError: a dimension or a number of kept tokens is outside its limits.
        """
        found = [(f"dimension {name}", size, *self.limits[name]) for name, size in sizes.items() if name in self.limits]
        if NUM_KEEP in self.on_host.intersection(self.inputs):
            # The arguments are swapped in the bindings' own documentation.
            smallest, _, largest = self._engine.get_tensor_profile_values(self.profile, NUM_KEEP)
            found += [(NUM_KEEP, *of_stage) for of_stage in zip(num_keep, smallest, largest, strict=True)]
        for what, size, least, most in found:
            if not least <= size <= most:
                remedy = (
                    "use smaller or fewer pictures or a shorter answer, or widen the target's limits and build the "
                    "engines again"
                )
                if self.blank_inputs and what == "dimension batch":
                    remedy = "ask one by one, as it is prefill and decode"
                raise CapaError(f"{self.path}: takes {least} to {most} of {what}, not {size}; {remedy}")

    def num_bytes(self, name: str, shape: Sequence[int]) -> int:
        """Bytes of a tensor in this shape."""
        return prod(shape) * np.dtype(self.dtypes[name]).itemsize
