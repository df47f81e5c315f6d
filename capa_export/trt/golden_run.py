"""Runs a kit's engines on its device, and holds what they compute against the kit's golden.

It takes the standard library, TensorRT and the driver: a device's Python may have no arrays. It is a process of its
own, since what TensorRT compiles wrong may crash.
"""
# TensorRT comes without types.
# pyright: reportAny=false, reportExplicitAny=false, reportUnknownVariableType=false, reportUnknownMemberType=false

import ctypes
import importlib
import json
import mmap
import struct
import sys
from array import array
from collections.abc import Iterator, Mapping, Sequence
from math import ceil, isfinite, prod, sqrt
from operator import mul
from pathlib import Path
from typing import Any
from weakref import finalize

__all__ = ["GoldenError", "differences", "main", "problem"]

_ITEM_BYTES = {"FLOAT": 4, "HALF": 2, "BF16": 2, "INT64": 8, "INT32": 4, "BOOL": 1}
_STORED = {"F32": "FLOAT", "F16": "HALF", "BF16": "BF16", "I64": "INT64", "I32": "INT32", "BOOL": "BOOL"}
"""TensorRT's name of each type in a safetensors file."""
_ALIGNMENT = 256
_UPLOAD_BYTES = 16 << 20
_PAST, _PRESENT = "past_key_values.", "present."
_BLOCK_ROWS = 256
"""Of which decode has its caches."""
_TIE = 4.0
"""Standard deviations of a logit's error, as the cosine's bound allows it, that two logits may lie apart and tie."""


class GoldenError(Exception):
    """Why the golden cannot be run, in one line."""


def main(task_path: str) -> int:
    """Run what the task says; the findings, or the reason why there are none, go where the task says."""
    task = json.loads(Path(task_path).read_text(encoding="utf-8"))
    try:
        result: dict[str, Any] = {"outputs": list(_findings(importlib.import_module(task["runtime"]), task))}
    except GoldenError as error:
        result = {"error": str(error)}
    Path(task["result"]).write_text(json.dumps(result), encoding="utf-8")
    return int("error" in result)


def _findings(trt: Any, task: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What each output of each run shows; runs of decode behind a wrong prefill are left out, for they take its cache.

    Engines are loaded one after the other: a device may have room for no two.
    """
    golden = _Golden(*map(Path, task["golden"]))
    driver, log = _Driver(), _logger(trt)
    if task["plugins"] == "python":
        # Of a kit that is built where this package is.
        importlib.import_module("capa_export.kernels.plugins.python_plugins").register(trt)
    runtime = trt.Runtime(log)
    runtime.engine_host_code_allowed = task["plugins"] == "native"
    by_graph = {
        graph: (name, entry, profile)
        for name, entry in task["engines"].items()
        for profile, graph in enumerate(entry["serves"])
    }
    engine: _Engine | None = None
    cache: dict[str, list[bytes]] = {}
    wrong, moved = False, False
    for run in golden.runs:
        name, entry, profile = by_graph[run["onnx"]]
        if _takes_cache(run) and wrong:
            continue
        if engine is None or engine.name != name:
            # The memory of the last engine first.
            engine = None
            engine = _Engine(trt, runtime, driver, log, name, entry)
        outputs = engine.run(golden, run, cache, profile)
        wrong = False
        for output, key in run["outputs"].items():
            memory, dtype = outputs[output]
            finding = differences(golden.numbers(key), _decoded(memory.download(), dtype))
            moved = moved or bool(finding.get("moved"))
            said = problem(output, finding, task["bounds"], moved=moved)
            wrong = wrong or said is not None
            yield {"engine": name, "output": output, **finding, "problem": said}
        cache = {
            _PAST + key[len(_PRESENT) :]: _grown(cache.get(_PAST + key[len(_PRESENT) :]), memory, run["caches"][key][1])
            for key, (memory, _) in outputs.items()
            if key.startswith(_PRESENT)
        }


def _grown(rows: "list[bytes] | None", memory: "_Memory", heads: int) -> list[bytes]:
    """The rows of each head of a prompt's cache, and those behind them that a run returned."""
    data = memory.download()
    size = len(data) // heads
    return [(rows[head] if rows else b"") + data[head * size :][:size] for head in range(heads)]


def _takes_cache(run: Mapping[str, Any]) -> bool:
    return any(name.startswith(_PAST) for name in run["caches"])


def differences(golden: Sequence[float], found: Sequence[float]) -> dict[str, Any]:
    """How numbers differ from the golden's.

    Returns:
        Of positions how many of how many `moved`. Of others the `cosine`, the `norm_ratio`, which is the distance of
        the quotient of both norms from 1, and, if the largest is another, how far the golden's lie apart there (`lead`)
        in units of their root mean square. Numbers that are none make all of them NaN.
    """
    if isinstance(golden, array) and golden.typecode == "q":
        return {"moved": len(set(golden) - set(found)), "of": len(golden)}
    if not all(map(isfinite, found)):
        return {"cosine": float("nan"), "norm_ratio": float("nan"), "lead": float("nan")}
    dot, own, other = (sum(map(mul, a, b)) for a, b in ((golden, found), (golden, golden), (found, found)))
    if not own or not other:
        same = own == other
        return {"cosine": float(same), "norm_ratio": float(not same), "lead": 0.0}
    top, best = (max(range(len(one)), key=one.__getitem__) for one in (found, golden))
    return {
        "cosine": dot / sqrt(own) / sqrt(other),
        "norm_ratio": abs(sqrt(other / own) - 1),
        "lead": (golden[best] - golden[top]) / sqrt(own / len(golden)),
    }


def problem(output: str, finding: Mapping[str, Any], bounds: Mapping[str, Any], *, moved: bool) -> str | None:
    """What is wrong about an output, if anything is.

    Args:
        output: its name.
        finding: what `differences` says.
        bounds: `logits` and `hidden` with a least `cosine` and a largest `norm_ratio`, and the `share` of kept
            positions that may move.
        moved: whether prefill keeps other positions, which makes its logits those of a prompt that is slightly another.
    """
    if "moved" in finding:
        allowed = ceil(bounds["share"] * finding["of"])
        return f"{finding['moved']} of {finding['of']} are others" if finding["moved"] > allowed else None
    bound = bounds["logits" if output == "logits" and not moved else "hidden"]
    cosine, norm_ratio = finding["cosine"], finding["norm_ratio"]
    # Written so that NaN is a problem.
    if not cosine >= bound["cosine"]:
        return f"cosine {cosine:.6f} where the golden takes {bound['cosine']:g} or more"
    if not norm_ratio <= bound["norm_ratio"]:
        return f"norm off by {norm_ratio:.3g} where the golden takes {bound['norm_ratio']:g} or less"
    # Of two vectors so close that have one norm, the difference's root mean square.
    spread = sqrt(2 * max(1 - bound["cosine"], 0))
    if output == "logits" and finding["lead"] > _TIE * spread:
        return f"another token comes first, which the golden has {finding['lead']:.3g} standard deviations behind"
    return None


class _Golden:
    """The runs of a golden, and its tensors.

    Raises:
        GoldenError: a file is damaged.
    """

    def __init__(self, runs: Path, tensors: Path) -> None:
        self._path = runs
        try:
            self.runs = json.loads(runs.read_text(encoding="utf-8"))["runs"]
            with tensors.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                self._entries = json.loads(file.read(length))
                self._data = file.read()
        except (OSError, ValueError, KeyError, TypeError, struct.error, MemoryError) as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> GoldenError:
        return GoldenError(f"{self._path}: damaged: copy the kit again ({type(error).__name__})")

    def tensor(self, key: str) -> tuple[str, tuple[int, ...], bytes]:
        """TensorRT's name of its type, its shape, and its bytes."""
        try:
            entry = self._entries[key]
            dtype, shape = _STORED[entry["dtype"]], tuple(entry["shape"])
            start, end = entry["data_offsets"]
            if not 0 <= start <= end <= len(self._data) or end - start != prod(shape) * _ITEM_BYTES[dtype]:
                raise ValueError(key)
        except (KeyError, TypeError, ValueError) as error:
            raise self._damaged(error) from error
        return dtype, shape, self._data[start:end]

    def numbers(self, key: str) -> Sequence[float]:
        dtype, _, data = self.tensor(key)
        return _decoded(data, dtype)


def _decoded(data: bytes, dtype: str) -> Sequence[float]:
    """Numbers of a tensor; integers as an `array` of "q"."""
    if dtype == "HALF":
        return struct.unpack(f"<{len(data) // 2}e", data)
    if dtype == "BF16":
        return array("f", array("I", (half << 16 for half in array("H", data))).tobytes())
    if dtype == "FLOAT":
        return array("f", data)
    return array("q", array({"INT64": "q", "INT32": "i", "BOOL": "b"}[dtype], data))


def _encoded(data: bytes, stored: str, wanted: str) -> bytes:
    """The bytes of a stored tensor in an engine's type; of bf16 graphs they are stored as FP32."""
    if (stored, wanted) != ("FLOAT", "BF16"):
        return data
    # To the nearest, and of two to the even one.
    return array("H", ((one + 0x7FFF + (one >> 16 & 1)) >> 16 for one in array("I", data))).tobytes()


class _Driver:
    """The functions of the CUDA driver that a run takes, in the first GPU's primary context, which is TensorRT's."""

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise GoldenError("no NVIDIA driver here (libcuda.so.1)") from error
        device, context, stream = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        self.call("cuInit", 0)
        self.call("cuDeviceGet", ctypes.byref(device), 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self.call("cuCtxSetCurrent", context)
        # One that does not wait for the default stream.
        self.call("cuStreamCreate", ctypes.byref(stream), 1)
        self.stream: int = stream.value or 0

    def call(self, function: str, *args: Any) -> None:
        if status := getattr(self._library, function)(*args):
            raise GoldenError(f"the GPU failed: {function}: CUDA error {status}")

    def synchronize(self) -> None:
        self.call("cuCtxSynchronize")

    def release(self, address: int) -> None:
        # Of a GPU that has failed nothing can be given back.
        self._library.cuMemFree_v2(ctypes.c_uint64(address))


class _Memory:
    """Device memory, given back with the last reference to it; what is not written yet is no number in any float."""

    def __init__(self, driver: _Driver, num_bytes: int) -> None:
        self._driver, self.num_bytes = driver, num_bytes
        pointer, size = ctypes.c_uint64(), ctypes.c_size_t(max(num_bytes, 1))
        driver.call("cuMemAlloc_v2", ctypes.byref(pointer), size)
        self.address = pointer.value
        finalize(self, driver.release, self.address)
        driver.call("cuMemsetD8_v2", pointer, ctypes.c_ubyte(255), size)
        driver.synchronize()

    def upload(self, data: bytes, *, at: int = 0) -> None:
        assert at + len(data) <= self.num_bytes
        if data:
            self._driver.call("cuMemcpyHtoD_v2", ctypes.c_uint64(self.address + at), data, ctypes.c_size_t(len(data)))
            self._driver.synchronize()

    def download(self) -> bytes:
        data = ctypes.create_string_buffer(max(self.num_bytes, 1))
        if self.num_bytes:
            size = ctypes.c_size_t(self.num_bytes)
            self._driver.call("cuMemcpyDtoH_v2", data, ctypes.c_uint64(self.address), size)
        return data.raw[: self.num_bytes]


class _Engine:
    """An engine that is loaded, with its weights, one execution context, and the memory that this takes.

    Raises:
        GoldenError: TensorRT or the driver refuses.
    """

    def __init__(self, trt: Any, runtime: Any, driver: _Driver, log: Any, name: str, entry: Mapping[str, Any]) -> None:
        self._trt, self._driver, self._log, self.name = trt, driver, log, name
        with Path(entry["plan"]).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
            self._engine = self._given(runtime.deserialize_cuda_engine(plan), "cannot be loaded")
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self._context = self._given(self._engine.create_execution_context(strategy), "takes no execution context")
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        self._dtypes = {tensor: self._engine.get_tensor_dtype(tensor).name for tensor in names}
        self._inputs = [one for one in names if self._engine.get_tensor_mode(one) == trt.TensorIOMode.INPUT]
        self._outputs = [one for one in names if one not in self._inputs]
        self._profile = 0
        self._given(self._context.set_optimization_profile_async(0, driver.stream), "does not take its own profile")
        self._activations = _Memory(driver, self._engine.device_memory_size_v2)
        self._context.set_device_memory(self._activations.address, self._activations.num_bytes)
        self._weights = self._uploaded(Path(entry["weights"])) if entry["weights"] else {}
        self._serves_several = len(entry["serves"]) > 1

    def _given(self, answer: Any, what: str) -> Any:
        """What TensorRT answers, unless it refuses."""
        if answer is None or answer is False:
            reason = next((line for message in self._log.errors for line in message.splitlines()), "it gave no reason")
            raise GoldenError(f"{self.name}.engine: {what} ({self._trt.__name__}: {reason})")
        return answer

    def _uploaded(self, table: Path) -> dict[str, _Memory]:
        """The weights that are inputs, as a table says where they lie."""
        weights: dict[str, _Memory] = {}
        for name, entry in json.loads(table.read_text(encoding="utf-8")).items():
            weights[name] = _Memory(self._driver, entry["length"])
            with (table.parent / entry["file"]).open("rb") as file:
                file.seek(entry["offset"])
                for at in range(0, entry["length"], _UPLOAD_BYTES):
                    weights[name].upload(file.read(min(_UPLOAD_BYTES, entry["length"] - at)), at=at)
            self._address(name, weights[name].address)
        return weights

    def _address(self, name: str, address: int) -> None:
        self._given(self._context.set_tensor_address(name, address), f"does not take the memory of {name}")

    def run(
        self, golden: _Golden, run: Mapping[str, Any], cache: Mapping[str, list[bytes]], profile: int
    ) -> dict[str, tuple[_Memory, str]]:
        """Execute a run of the golden; returns the memory of every output, and its type.

        Args:
            golden: with the inputs.
            run: the run.
            cache: rows of each head that the runs before left, by the names of inputs.
            profile: of the engine, for the run's graph; what that has not is zeros, and of the smallest shape.
        """
        if profile != self._profile:
            taken = self._context.set_optimization_profile_async(profile, self._driver.stream)
            self._given(taken, "does not take its own profile")
            self._profile = profile
        # A step returns its own row alone.
        shapes = {
            name: (*shape[:2], 1, shape[3]) if _takes_cache(run) else tuple(shape)
            for name, shape in run["caches"].items()
        }
        held: list[Any] = []
        for name in self._inputs:
            if name in self._weights:
                continue
            if name in cache:
                held.append(self._in_blocks(name, cache[name], shapes[name][3]))
                continue
            least = tuple(abs(size) for size in self._engine.get_tensor_shape(name))
            if name in run["inputs"]:
                stored, shape, data = golden.tensor(run["inputs"][name])
                # The positions of a step have no batch where prefill and decode share an engine.
                shape = (*shape[: len(least) - 1], prod(shape[len(least) - 1 :]))
                data = _encoded(data, stored, self._dtypes[name])
            elif self._serves_several:
                stored, shape = self._dtypes[name], least
                data = bytes(prod(shape) * _ITEM_BYTES[stored])
            else:
                raise GoldenError(f"{self.name}.engine: takes {name}, of which the golden has no value")
            if len(data) != prod(shape) * _ITEM_BYTES[self._dtypes[name]]:
                raise GoldenError(f"{self.name}.engine: takes {name} as {self._dtypes[name]}, the golden has {stored}")
            self._shape(name, shape)
            if self._engine.get_tensor_location(name) == self._trt.TensorLocation.HOST:
                held.append(_on_host(data))
                self._address(name, held[-1][1])
            else:
                memory = _Memory(self._driver, len(data))
                memory.upload(data)
                held.append(memory)
                self._address(name, memory.address)
        try:
            missing = self._context.infer_shapes()
        except RuntimeError as error:
            raise GoldenError(f"{self.name}.engine: does not take these shapes ({error})") from error
        self._given(not missing, f"lacks {missing}")
        outputs: dict[str, tuple[_Memory, str]] = {}
        for name in self._outputs:
            known = tuple(self._context.get_tensor_shape(name))
            if name in shapes or name in run["outputs"] or not self._serves_several:
                shape = shapes[name] if name in shapes else golden.tensor(run["outputs"][name])[1]
            else:
                shape = tuple(abs(size) for size in known)
            fits = len(known) == len(shape) and all(a in (-1, b) for a, b in zip(known, shape, strict=True))
            # Of another shape it would be written past the end.
            self._given(fits, f"makes {name} of shape {known} where the golden has {shape}")
            outputs[name] = _Memory(self._driver, prod(shape) * _ITEM_BYTES[self._dtypes[name]]), self._dtypes[name]
            self._address(name, outputs[name][0].address)
        self._given(self._context.execute_async_v3(self._driver.stream), "failed to run")
        try:
            self._driver.call("cuStreamSynchronize", ctypes.c_void_p(self._driver.stream))
        except GoldenError as error:
            raise GoldenError(f"{self.name}.engine: failed to run ({error})") from error
        return outputs

    def _in_blocks(self, name: str, heads: Sequence[bytes], head_size: int) -> _Memory:
        """A cache of one prompt in blocks, with zeros behind its rows."""
        block = _BLOCK_ROWS * head_size * _ITEM_BYTES[self._dtypes[name]]
        blocks = -(-len(heads[0]) // block)
        memory = _Memory(self._driver, len(heads) * blocks * block)
        memory.upload(b"".join(rows.ljust(blocks * block, b"\0") for rows in heads))
        self._shape(name, (1, len(heads), blocks, _BLOCK_ROWS, head_size))
        self._address(name, memory.address)
        return memory

    def _shape(self, name: str, shape: Sequence[int]) -> None:
        self._given(self._context.set_input_shape(name, tuple(shape)), f"does not take {name} of shape {tuple(shape)}")


def _on_host(data: bytes) -> tuple[Any, int]:
    """Host memory with this in it, and an address in it that TensorRT takes."""
    room = ctypes.create_string_buffer(len(data) + _ALIGNMENT)
    address = ctypes.addressof(room) + -ctypes.addressof(room) % _ALIGNMENT
    ctypes.memmove(address, data, len(data))
    return room, address


def _logger(trt: Any) -> Any:
    class Log(trt.ILogger):
        """Sends errors and warnings to standard error, and keeps the errors."""

        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity <= trt.ILogger.WARNING:
                sys.stderr.write(f"[{severity.name}] {msg}\n")
            if severity <= trt.ILogger.ERROR:
                self.errors.append(msg)

    return Log()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
