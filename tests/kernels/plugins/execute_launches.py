"""Runs plugins over the stand-in driver: `python -m tests.kernels.plugins.execute_launches FOLDER` is one process.

The folder has `calls.pt`, a list of calls as dictionaries, and `libcuda.so.1`, which the process must find first. If it
has `plugin.so`, the C++ plugins of the library in the environment variable LIBRARY run, and else those in Python.
"""

import ctypes
import os
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from capa_export.kernels import OPERATORS
from capa_export.kernels.cuda import Buffer, Stream, require_gpu
from capa_export.kernels.operator import Operator
from tests.kernels.plugins.test_python_launches import describe, make_plugin, stand_in_tensorrt
from tests.kernels.ptx.launch import launch
from tests.kernels.ptx.memory import GlobalMemory, KernelError
from tests.kernels.ptx.parse import Kernel, parse
from tests.kernels.ptx.run import compiled

BENCHMARK = Path(__file__).parents[3] / "benchmarks" / "gpu"
_FATBIN = b"\x50\xed\x55\xba"
_SIZES = {"u64": 8, "u32": 4, "f32": 4}

Tensors = Mapping[str, torch.Tensor]


class _Record(ctypes.Structure):
    _fields_ = (("address", ctypes.c_uint64), ("size", ctypes.c_uint64), ("uploaded", ctypes.c_uint64))


@cache
def _kernel(image: int) -> Kernel:
    """The kernel of an image: PTX, or a fatbin that holds PTX."""
    if ctypes.string_at(image, 4) == _FATBIN:
        size = int.from_bytes(ctypes.string_at(image + 8, 8), "little")
        data = ctypes.string_at(image, size + 16)
        text = data[data.index(b".version") :].split(b"\0")[0]
    else:
        text = ctypes.string_at(image)
    return parse(text.decode())


class _Gpu:
    """What launches find in memory."""

    def __init__(self, driver: ctypes.CDLL) -> None:
        self._driver, self._memory, self._known = driver, GlobalMemory(), set[int]()
        kind = ctypes.CFUNCTYPE(
            *(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p),
            *(ctypes.POINTER(ctypes.c_uint), ctypes.POINTER(ctypes.c_void_p)),
        )
        self._run = kind(self.run)
        driver.stand_in_run_with(self._run)

    def run(self, image: int, name: bytes, dims: Any, params: Any) -> int:
        """Run a launch from its PTX; not 0 if the kernel does what it may not."""
        kernel = _kernel(image)
        assert (kernel.name, kernel.threads) == (name.decode(), dims[3])
        records = ctypes.POINTER(_Record)()
        for index in range(self._driver.stand_in_buffers(ctypes.byref(records))):
            record = records[index]
            if record.size and record.address not in self._known:
                self._known.add(record.address)
                data = np.ctypeslib.as_array((ctypes.c_uint8 * record.size).from_address(record.address))
                self._memory.add(f"{index}", data, written=bool(record.uploaded), address=record.address)
        arguments = [
            ctypes.string_at(params[index], _SIZES[one]) for index, one in enumerate(kernel.parameters.values())
        ]
        try:
            launch(kernel, self._memory, arguments, dims[:3], dims[4])
        except KernelError as error:
            sys.stderr.write(f"{error}\n")
            return 1
        return 0


def _run_in_python(
    operator: Operator, device: Tensors, outputs: Tensors, addresses: list[int], call: Any, stream: int
) -> None:
    trt = stand_in_tensorrt()
    plugin = make_plugin(trt, operator, [*compiled("8.0").values()], call["attributes"])
    described = describe(trt, dict(device), operator), describe(trt, dict(outputs), operator)
    limits = [[type("Limits", (), {"max": one.dims}) for one in side] for side in described]
    workspace = Buffer(plugin.get_workspace_size(*limits))
    plugin.on_shape_change(*described)
    plugin.enqueue(*described, addresses[: len(device)], addresses[len(device) :], workspace.address, stream)


def _run_in_cpp(
    plugins: Any,
    operator: Operator,
    device: Tensors,
    outputs: Tensors,
    addresses: list[int],
    call: Any,
    stream: int,
) -> None:
    shapes = [(one.dtype, tuple(one.shape)) for one in (*device.values(), *outputs.values())]
    tensors = [(*one, address) for one, address in zip(shapes, addresses, strict=True)]
    held: list[Buffer] = []

    def allocate(num_bytes: int) -> int:
        held.append(Buffer(num_bytes))
        return held[-1].address

    plugins.run(operator, tensors, call["attributes"], allocate, stream)


def main(folder: Path) -> None:
    """Run the calls of a folder, and leave `outputs.pt` in it."""
    gpu = _Gpu(ctypes.CDLL("libcuda.so.1"))
    require_gpu()
    stream = Stream()
    run: Callable[..., None] = _run_in_python
    if (folder / "plugin.so").exists():
        sys.path.insert(0, str(BENCHMARK))
        from enqueue import NativePlugins  # pyright: ignore[reportMissingImports]

        plugins = NativePlugins(Path(os.environ["LIBRARY"]), folder / "plugin.so")
        run = lambda *args: _run_in_cpp(plugins, *args)  # noqa: E731  # The library before the rest.
    results: list[dict[str, torch.Tensor]] = []
    for call in torch.load(folder / "calls.pt"):
        operator = next(one for one in OPERATORS if one.name == call["operator"])
        device = {name: one for name, one in call["inputs"].items() if name not in operator.value_inputs}
        outputs: dict[str, torch.Tensor] = call["outputs"]
        buffers = [Buffer(one.nbytes) for one in (*device.values(), *outputs.values())]
        for buffer, tensor in zip(buffers, device.values(), strict=False):
            stream.upload(buffer, tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
        run(operator, device, outputs, [one.address for one in buffers], call, int(stream.handle))
        found: dict[str, torch.Tensor] = {}
        for (name, like), buffer in zip(outputs.items(), buffers[len(device) :], strict=True):
            raw = stream.download(buffer, (like.nbytes,), np.uint8)
            found[name] = torch.from_numpy(raw).view(like.dtype).reshape(like.shape)
        results.append(found)
    torch.save(results, folder / "outputs.pt")
    del gpu


if __name__ == "__main__":
    main(Path(sys.argv[1]))
