"""Python plugins: that they launch what `execute` launches."""

# ruff: noqa: N802  # A stand-in has the names of the driver's own functions.

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cuda.bindings import driver as real

from capa_export.base.errors import CapaError
from capa_export.graph.functions import FUNCTIONS
from capa_export.kernels import OPERATORS, cuda
from capa_export.kernels.compile import CompiledKernel, has_real, variant_name
from capa_export.kernels.execute import execute
from capa_export.kernels.operator import Operator
from capa_export.kernels.plugins import launcher, python_plugins


def field(name: str, data: Any, type_: Any) -> SimpleNamespace:
    return SimpleNamespace(name=name, data=data, type=type_)


def stand_in_tensorrt(taken: tuple[str, ...] = ()) -> SimpleNamespace:
    """What plugin classes need of the module, so that they run without TensorRT."""
    interfaces = ("IPluginV3", "IPluginV3OneCore", "IPluginV3OneBuild", "IPluginV3OneRuntime", "IPluginCreatorV3One")
    creators: dict[str, Any] = {}

    def register_creator(creator: Any, namespace: str) -> bool:
        creators[creator.name] = creator
        return creator.name not in taken

    return SimpleNamespace(
        **{name: type(name, (), {}) for name in interfaces},
        PluginField=field,
        PluginFieldCollection=list,
        PluginFieldType=Enum("PluginFieldType", ["INT32", "FLOAT32"]),
        DataType=Enum("DataType", ["HALF", "BF16", "FLOAT", "INT32", "INT64"]),
        TensorFormat=Enum("TensorFormat", ["LINEAR", "CHW4"]),
        get_plugin_registry=lambda: SimpleNamespace(register_creator=register_creator),
        creators=creators,
    )


class Driver:
    """Records the calls, and says what a driver would: every function has the number of its image."""

    def __init__(self, capability: str) -> None:
        self.capability = [int(part) for part in capability.split(".")]
        self.context = 1
        self.loaded: list[bytes] = []
        self.allowed: list[tuple[Any, int]] = []
        self.launched: list[tuple[Any, ...]] = []
        self.status = real.CUresult.CUDA_SUCCESS

    def cuCtxGetCurrent(self) -> tuple[Any, ...]:
        return self.status, self.context

    def cuCtxGetDevice(self) -> tuple[Any, ...]:
        return self.status, 0

    def cuDeviceGetAttribute(self, attribute: Any, device: int) -> tuple[Any, ...]:
        return self.status, self.capability["MINOR" in attribute.name]

    def cuModuleLoadData(self, image: bytes) -> tuple[Any, ...]:
        self.loaded.append(image)
        return self.status, image

    def cuModuleGetFunction(self, module: bytes, name: bytes) -> tuple[Any, ...]:
        return self.status, (module, name)

    def cuFuncSetAttribute(self, function: Any, attribute: Any, value: int) -> tuple[Any, ...]:
        self.allowed.append((function, value))
        return (self.status,)

    def cuLaunchKernel(self, *args: Any) -> tuple[Any, ...]:
        self.launched.append(args)
        return (self.status,)


@dataclass
class RecordingKernel:
    """Takes the place of a kernel in `execute`."""

    kernel: Any
    launched: list[tuple[Any, ...]]

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        def launch(*args: Any, num_warps: int, **constants: int) -> None:
            values = [arg.data_ptr() if isinstance(arg, torch.Tensor) else arg for arg in args]
            self.launched.append((self.kernel.__name__, grid, num_warps, values))

        return launch


SIZES: dict[str, dict[str, tuple[int, ...]]] = {
    "ContributionScore": {
        "query": (1, 8, 1, 80),
        "key": (1, 2, 777, 80),
        "value": (1, 2, 777, 80),
        "output_weight": (640, 640),
        "text_positions": (1, 33),
    },
    "TopKKeep": {"scores": (1, 777), "num_keep": (1,)},
    "TokenGather": {
        "hidden": (1, 777, 640),
        "key": (1, 2, 777, 80),
        "value": (1, 2, 777, 80),
        "cos": (1, 777, 40),
        "sin": (1, 777, 40),
        "kept": (1, 205),
    },
    "VisualScale": {"x": (1, 205, 640), "scale": (640,), "text": (1, 33, 640), "text_rows": (1, 33)},
}
ATTRIBUTES: dict[str, float] = {"scale": 0.125, "min_keep_per_image": 3}


def compiled(operator: Operator, capability: str, kind: Any = "cubin") -> list[CompiledKernel]:
    """Every variant for head size 80, its name as the image; every second one with much shared memory."""
    sizes = dict.fromkeys(operator.compiled_sizes, 80)
    launches = operator.launches(operator.symbols(sizes))
    variants = {
        variant_name(launch, dtype if has_real(operator, launch) else None, sizes): launch
        for launch in launches
        for dtype in ("fp16", "bf16", "fp32")
    }
    return [
        CompiledKernel(
            operator=operator.name,
            name=launch.kernel.__name__,
            variant=variant,
            compute_capability=capability,
            kind=kind,
            image=variant.encode(),
            warps=launch.warps,
            shared_bytes=[64, 49153][index % 2],
            null_pointers=2 + index % 2,
            registers=32,
            spill_bytes=0,
            stack_bytes=0,
        )
        for index, (variant, launch) in enumerate(variants.items())
    ]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    stand_in = Driver("8.6")
    monkeypatch.setattr(cuda, "_driver", lambda: stand_in)
    return stand_in


def make_plugin(
    trt: SimpleNamespace,
    operator: Operator,
    kernels: list[CompiledKernel],
    attributes: dict[str, float] = ATTRIBUTES,
) -> Any:
    """A plugin as TensorRT makes it."""
    python_plugins.register(trt, kernels)
    creator = trt.creators[operator.name]
    # As the parser hands them over: all attributes of the node, its own among them.
    values = {name: attributes[name] for name in operator.attributes}
    fields = [field("plugin_version", "1", None), *(field(name, [value], None) for name, value in values.items())]
    return creator.create_plugin("node", fields, None).attach_to_context(None)


def describe(trt: SimpleNamespace, tensors: dict[str, torch.Tensor], operator: Operator) -> list[Any]:
    """As TensorRT describes them: the batch axis is there where the graph has it."""
    types = {
        torch.float16: trt.DataType.HALF,
        torch.bfloat16: trt.DataType.BF16,
        torch.float32: trt.DataType.FLOAT,
        torch.int64: trt.DataType.INT64,
    }
    spec = {**operator.inputs, **operator.outputs}
    return [
        SimpleNamespace(
            dims=tuple(tensor.shape)[len(spec[name].shape) - len(spec[name].graph_shape) :],
            type=types[tensor.dtype],
            format=trt.TensorFormat.LINEAR,
        )
        for name, tensor in tensors.items()
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_a_plugin_launches_what_execute_launches(operator: Operator, dtype: torch.dtype, driver: Driver) -> None:
    dtypes = {"real": dtype, "fp32": torch.float32, "int64": torch.int64}
    inputs = {
        name: torch.full(SIZES[operator.name][name], 205, dtype=dtypes[tensor.dtype])
        for name, tensor in operator.inputs.items()
    }
    attributes = {name: ATTRIBUTES[name] for name in operator.attributes}
    expected: list[tuple[Any, ...]] = []
    recording = replace(
        operator,
        launches=lambda size: [
            replace(launch, kernel=RecordingKernel(launch.kernel, expected)) for launch in operator.launches(size)
        ],
    )
    outputs = execute(recording, inputs, **attributes)

    trt = stand_in_tensorrt()
    kernels = compiled(operator, "8.6")
    plugin = make_plugin(trt, operator, kernels)
    on_device = {name: tensor for name, tensor in inputs.items() if name not in operator.value_inputs}
    described = describe(trt, on_device, operator), describe(trt, outputs, operator)
    plugin.on_shape_change(*described)
    loaded = len(driver.loaded)
    addresses = [[tensor.data_ptr() for tensor in tensors.values()] for tensors in (on_device, outputs)]
    workspace = 1 << 40
    plugin.enqueue(*described, *addresses, workspace, 77)

    assert len(driver.loaded) == loaded, "kernels are loaded before anything is enqueued"
    assert len(driver.launched) == len(expected) > 0
    limit = workspace + plugin.get_workspace_size(
        *([SimpleNamespace(max=one.dims) for one in side] for side in described)
    )
    scratch: dict[int, int] = {}
    name_of_dtype = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    for call, (name, grid, warps, args) in zip(driver.launched, expected, strict=True):
        (image, symbol), *rest = call
        kernel = next(one for one in kernels if one.variant.encode() == image)
        assert symbol.decode() == name == kernel.name
        assert kernel.variant.split(".")[1:2] in ([], [name_of_dtype])
        assert tuple(rest[:3]) == grid
        assert rest[3:8] == [32 * warps, 1, 1, kernel.shared_bytes, 77]
        (values, types), extra = rest[8:]
        assert extra == 0
        assert values[len(args) :] == (0,) * kernel.null_pointers
        assert types[len(args) :] == (ctypes.c_void_p,) * kernel.null_pointers
        for value, type_, wanted in zip(values[: len(args)], types[: len(args)], args, strict=True):
            if type_ is ctypes.c_void_p and workspace <= value < limit:
                # `execute` has a buffer for each piece of scratch memory.
                assert scratch.setdefault(wanted, value) == value
            else:
                assert value == wanted
            is_large = isinstance(wanted, int) and wanted > 1 << 31
            assert type_ is (
                ctypes.c_float if isinstance(wanted, float) else [ctypes.c_int32, ctypes.c_void_p][is_large]
            )
    assert len(set(scratch.values())) == len(scratch)
    assert all(address % 256 == 0 for address in scratch.values())
    large = [one for one in kernels if one.shared_bytes == 49153 and one.image in driver.loaded]
    assert driver.allowed == [((one.image, one.name.encode()), 49153) for one in large]


def test_kernels_are_loaded_once_per_context_and_prepared_once_per_shape(driver: Driver) -> None:
    operator = next(one for one in OPERATORS if one.name == "VisualScale")
    trt = stand_in_tensorrt()
    plugin = make_plugin(trt, operator, compiled(operator, "8.6"))
    tensors = {name: torch.empty(shape, dtype=torch.float16) for name, shape in SIZES["VisualScale"].items()}
    tensors |= {"text_rows": torch.empty(1, 33, dtype=torch.int64), "y": tensors["x"]}
    described = describe(trt, tensors, operator)
    for _ in range(3):
        plugin.enqueue(described[:4], described[4:], [16, 32, 48, 64], [80], 0, 7)
    assert len(driver.loaded) == 1
    assert len(driver.launched) == 3
    driver.context = 2
    plugin.attach_to_context(None).on_shape_change(described[:4], described[4:])
    assert len(driver.loaded) == 2


@pytest.mark.parametrize("kind", ["cubin", "ptx"])
def test_another_gpu_takes_ptx_and_says_so(kind: str, driver: Driver, caplog: pytest.LogCaptureFixture) -> None:
    operator = next(one for one in OPERATORS if one.name == "VisualScale")
    launch = launcher.Launcher([*compiled(operator, "8.0", kind)])
    size = operator.sizes(SIZES["VisualScale"], {})
    if kind == "cubin":
        with pytest.raises(CapaError, match=r"no kernel merge_rows\.fp16 for compute capability 8\.6"):
            launch.prepare(operator, "fp16", size)
    else:
        launch.prepare(operator, "fp16", size)
        assert driver.loaded == [b"merge_rows.fp16\0"]
        assert "compute capability 8.6: the driver compiles PTX" in caplog.text


def test_what_the_driver_refuses_is_raised(driver: Driver) -> None:
    driver.status = real.CUresult.CUDA_ERROR_INVALID_IMAGE
    operator = next(one for one in OPERATORS if one.name == "VisualScale")
    with pytest.raises(CapaError, match="CUDA_ERROR_INVALID_IMAGE"):
        launcher.Launcher(compiled(operator, "8.6")).prepare(operator, "fp16", operator.sizes(SIZES["VisualScale"], {}))


def test_plugins_are_registered_under_the_names_on_the_nodes_and_once() -> None:
    trt = stand_in_tensorrt()
    python_plugins.register(trt, [])
    names = ["ContributionScore", "TopKKeep", "TokenGather", "VisualScale"]
    assert list(trt.creators) == names
    assert {one.plugin_namespace + one.plugin_version for one in trt.creators.values()} == {"capa1"}
    for operator in OPERATORS:
        # The functions' inputs and outputs are the plugin's, in this order.
        function = FUNCTIONS[operator.name]
        assert [value.name for value in function.inputs] == list(operator.inputs)
        assert [value.name for value in function.outputs] == list(operator.outputs)
        assert list(function.attributes) == list(operator.attributes)
    with pytest.raises(CapaError, match="a plugin capa::TopKKeep is registered already"):
        python_plugins.register(stand_in_tensorrt(taken=("TopKKeep",)), [])
    with pytest.raises(ValueError, match="TopKKeep node: attributes are missing: min_keep_per_image"):
        trt.creators["TopKKeep"].create_plugin("node", [], None)


def test_attributes_are_fields_of_the_plugin() -> None:
    trt = stand_in_tensorrt()
    operator = next(one for one in OPERATORS if one.name == "ContributionScore")
    (field,) = make_plugin(trt, operator, []).get_fields_to_serialize()
    assert (field.name, field.type, field.data.dtype.name, list(field.data)) == (
        *("scale", trt.PluginFieldType.FLOAT32, "float32"),
        [0.125],
    )


def test_formats_are_linear_and_real_is_one_dtype_throughout() -> None:
    trt = stand_in_tensorrt()
    operator = next(one for one in OPERATORS if one.name == "VisualScale")
    plugin = make_plugin(trt, operator, [])

    def supported(position: int, type_: str, layout: str = "LINEAR", first: str = "BF16") -> bool:
        one = SimpleNamespace(type=trt.DataType[type_], format=trt.TensorFormat[layout])
        others = SimpleNamespace(type=trt.DataType[first], format=trt.TensorFormat.LINEAR)
        descriptions = [SimpleNamespace(desc=one if index == position else others) for index in range(5)]
        return plugin.supports_format_combination(position, descriptions, 4)

    assert [supported(0, type_) for type_ in ("HALF", "BF16", "FLOAT", "INT64")] == [True, True, True, False]
    assert [supported(4, type_) for type_ in ("HALF", "BF16", "FLOAT")] == [False, True, False]
    assert [supported(3, type_) for type_ in ("INT64", "INT32")] == [True, False]
    assert not supported(4, "BF16", "CHW4")


def test_an_address_that_the_kernels_cannot_read_is_refused() -> None:
    (operator,) = (one for one in OPERATORS if one.name == "TokenGather")
    with pytest.raises(CapaError, match=r"TokenGather: x lies at 0x1008, no multiple of 16"):
        launcher.Launcher([]).launch(operator, [], {"x": 0x1008}, 0)
