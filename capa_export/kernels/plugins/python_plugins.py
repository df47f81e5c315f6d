"""TensorRT plugins in Python, one for each operator, made of what `Operator` says.

The bindings print what a method raises and report a failure to TensorRT.
"""

# TensorRT's bindings carry no types, and which of them it is, TensorRT or TensorRT-RTX, is known at run time only.
# pyright: reportUnknownParameterType=false, reportUntypedBaseClass=false

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from capa_export.base.errors import CapaError, ExitCode
from capa_export.config.plugins import HEAD_SIZES
from capa_export.graph.functions import PLUGIN
from capa_export.kernels import OPERATORS
from capa_export.kernels.compile import CompiledKernel
from capa_export.kernels.operator import Operator, Tensor
from capa_export.kernels.plugins.launcher import Call, Launcher, scratch_offsets

if TYPE_CHECKING:
    from capa_export.base.precision import Precision

__all__ = ["register"]

_FIELD_DTYPES: Mapping[type, Any] = {int: np.int32, float: np.float32}


def register(trt: Any, kernels: Sequence[CompiledKernel] | None = None) -> None:
    """Make the plugins known to TensorRT, in this process.

    Args:
        trt: the module `tensorrt` or `tensorrt_rtx`.
        kernels: what they launch; None compiles it when an engine runs, for the GPU it runs on.

    Raises:
        CapaError: TensorRT has plugins of these names already.
    """
    launcher = Launcher(kernels)
    for operator in OPERATORS:
        creator = _creator(trt, operator, launcher)
        if not trt.get_plugin_registry().register_creator(creator, creator.plugin_namespace):
            raise CapaError(
                f"a plugin {creator.plugin_namespace}::{operator.name} is registered already", ExitCode.ENGINE
            )


def _creator(trt: Any, operator: Operator, launcher: Launcher) -> Any:
    plugin_class = _plugin_class(trt, operator, launcher)

    class Creator(trt.IPluginCreatorV3One):
        def __init__(self) -> None:
            super().__init__()
            self.name = operator.name
            self.plugin_namespace = PLUGIN["plugin_namespace"]
            self.plugin_version = PLUGIN["plugin_version"]
            self._no_values = _arrays(operator, {})
            self.field_names = _fields(trt, operator, self._no_values)

        def create_plugin(self, name: str, fields: Any, _: Any) -> Any:
            given = {field.name: field.data for field in fields if field.name in operator.attributes}
            missing = set(operator.attributes) - set(given)
            if missing:
                raise ValueError(f"{operator.name} {name}: attributes are missing: {', '.join(sorted(missing))}")
            return plugin_class({key: kind(given[key][0]) for key, kind in operator.attributes.items()})

    return Creator()


def _arrays(operator: Operator, values: Mapping[str, float]) -> dict[str, np.ndarray]:
    """The attributes as arrays of one, or of none where there are no values."""
    return {
        name: np.array([values[name]] if values else [], _FIELD_DTYPES[kind])
        for name, kind in operator.attributes.items()
    }


def _fields(trt: Any, operator: Operator, arrays: Mapping[str, np.ndarray]) -> Any:
    """The attributes as TensorRT takes them: by address, so the arrays have to live as long as it may read them."""
    types = {int: trt.PluginFieldType.INT32, float: trt.PluginFieldType.FLOAT32}
    return trt.PluginFieldCollection(
        [trt.PluginField(name, arrays[name], types[kind]) for name, kind in operator.attributes.items()]
    )


def _with_batch(tensor: Tensor, shape: Sequence[Any], one: Any) -> list[Any]:
    """The shape of the graph's tensor as the operator has it."""
    return [one] * (len(tensor.shape) - len(tensor.graph_shape)) + list(shape)


def _plugin_class(trt: Any, operator: Operator, launcher: Launcher) -> type:
    # TensorRT passes inputs on the host apart, and only where output shapes are asked for.
    inputs = {name: tensor for name, tensor in operator.inputs.items() if name not in operator.value_inputs}
    tensors = [*inputs.values(), *operator.outputs.values()]
    first_real = next((index for index, tensor in enumerate(tensors) if tensor.dtype == "real"), 0)
    reals: dict[Any, Precision] = {trt.DataType.HALF: "fp16", trt.DataType.BF16: "bf16", trt.DataType.FLOAT: "fp32"}
    types = {"fp32": trt.DataType.FLOAT, "int32": trt.DataType.INT32, "int64": trt.DataType.INT64}

    def size_from(shapes: Sequence[Sequence[int]]) -> Any:
        """Sizes by name, from shapes of inputs and outputs: the largest that stands for a name."""
        sizes: dict[str, int] = {}
        for tensor, shape in zip(tensors, shapes, strict=True):
            for name, length in zip(tensor.shape, _with_batch(tensor, shape, 1), strict=True):
                if isinstance(name, str):
                    sizes[name] = max(sizes.get(name, -1), length)
        return SimpleNamespace(**sizes)

    def check_compiled(known: Mapping[str, int]) -> None:
        for name in operator.compiled_sizes:
            if known.get(name) not in HEAD_SIZES:
                raise ValueError(f"{operator.name}: {name} is {known.get(name, 'dynamic')}, not one of {HEAD_SIZES}")
        for name in operator.aligned_sizes:
            if known.get(name, 1) % 16:
                raise ValueError(f"{operator.name}: {name} is {known.get(name, 'dynamic')}, not a multiple of 16")

    class Plugin(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):
        def __init__(self, attributes: Mapping[str, float]) -> None:
            trt.IPluginV3.__init__(self)
            trt.IPluginV3OneCore.__init__(self)
            trt.IPluginV3OneBuild.__init__(self)
            trt.IPluginV3OneRuntime.__init__(self)
            self.plugin_name = operator.name
            self.plugin_namespace = PLUGIN["plugin_namespace"]
            self.plugin_version = PLUGIN["plugin_version"]
            self.num_outputs = len(operator.outputs)
            self._attributes = attributes
            self._arrays = _arrays(operator, attributes)
            self._shapes: list[tuple[int, ...]] = []
            self._calls: list[Call] = []
            self._offsets: dict[str, int] = {}

        def get_capability_interface(self, _: Any) -> Any:
            return self

        def clone(self) -> Any:
            return Plugin(self._attributes)

        def get_fields_to_serialize(self) -> Any:
            return _fields(trt, operator, self._arrays)

        def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
            real = input_types[first_real]
            return [real if one.dtype == "real" else types[one.dtype] for one in operator.outputs.values()]

        def get_output_shapes(self, inputs_: Sequence[Any], values: Sequence[Any], builder: Any) -> list[Any]:
            sizes = {size: value[0] for size, value in zip(operator.value_inputs.values(), values, strict=True)}
            for tensor, shape in zip(inputs.values(), inputs_, strict=True):
                expressions = [shape[axis] for axis in range(len(shape))]
                for name, size in zip(tensor.shape, _with_batch(tensor, expressions, builder.constant(1)), strict=True):
                    if isinstance(name, str):
                        sizes.setdefault(name, size)
            # Here and not in configure_plugin: after that has failed, TensorRT-RTX 1.7 corrupts its heap.
            check_compiled({name: size.get_constant_value() for name, size in sizes.items() if size.is_constant()})
            return [
                trt.DimsExprs(
                    [sizes[one] if isinstance(one, str) else builder.constant(one) for one in tensor.graph_shape]
                )
                for tensor in operator.outputs.values()
            ]

        def supports_format_combination(self, position: int, descriptions: Sequence[Any], _: int) -> bool:
            tensor, this = tensors[position], descriptions[position].desc
            if this.format != trt.TensorFormat.LINEAR:
                return False
            if tensor.dtype == "real":
                return this.type in reals and this.type == descriptions[first_real].desc.type
            return this.type == types[tensor.dtype]

        def configure_plugin(self, inputs_: Sequence[Any], outputs: Sequence[Any]) -> None:
            pass

        def get_valid_tactics(self) -> list[int]:
            return []

        def set_tactic(self, tactic: int) -> None:
            pass

        def get_workspace_size(self, inputs_: Sequence[Any], outputs: Sequence[Any]) -> int:
            return scratch_offsets(operator, size_from([one.max for one in (*inputs_, *outputs)]))[1]

        def attach_to_context(self, _: Any) -> Any:
            return self.clone()

        def on_shape_change(self, inputs_: Sequence[Any], outputs: Sequence[Any]) -> None:
            # Not left to enqueue: kernels cannot be loaded while a CUDA graph is captured.
            self._prepare(inputs_, outputs)

        def enqueue(
            self,
            input_descriptions: Sequence[Any],
            output_descriptions: Sequence[Any],
            inputs_: Sequence[int],
            outputs: Sequence[int],
            workspace: int,
            stream: int,
        ) -> None:
            self._prepare(input_descriptions, output_descriptions)
            addresses = zip((*inputs, *operator.outputs), (*inputs_, *outputs), strict=True)
            scratch = {name: workspace + offset for name, offset in self._offsets.items()}
            launcher.launch(operator, self._calls, {**dict(addresses), **scratch, **self._attributes}, stream)

        def _prepare(self, inputs_: Sequence[Any], outputs: Sequence[Any]) -> None:
            shapes = [tuple(one.dims) for one in (*inputs_, *outputs)]
            if shapes != self._shapes:
                size = size_from(shapes)
                self._calls = launcher.prepare(operator, reals.get(inputs_[first_real].type, "fp16"), size)
                self._offsets = scratch_offsets(operator, size)[0]
                self._shapes = shapes

    return Plugin
