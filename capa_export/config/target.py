"""A target: what one kind of device gets. Read from `engines/<name>.toml` or from the user's own file."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from capa_export.base.errors import CapaError, ExitCode
from capa_export.base.precision import Precision
from capa_export.base.toml import Settings, read_toml, shipped, shipped_names
from capa_export.base.weight_types import WEIGHT_TYPES, PackedLayers
from capa_export.config.quantization import TYPES

__all__ = ["Device", "DimRange", "Engine", "Target", "load_target", "version_parts"]

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Capability = Annotated[str, Field(pattern=r"^\d{1,3}\.\d$")]
Version = Annotated[str, Field(pattern=r"^\d{1,9}(\.\d{1,9}){0,3}$")]


class DimRange(Settings):
    """What a dimension, or a value that is a size, may be at run time."""

    min: int = Field(ge=0)
    opt: int
    """The size the kernels are tuned for."""
    max: int = Field(le=2**31 - 1)
    """TensorRT counts in 32 bits."""

    @model_validator(mode="after")
    def _ordered(self) -> "DimRange":
        if not self.min <= self.opt <= self.max:
            raise ValueError(f"must be min <= opt <= max, not {self.min}, {self.opt}, {self.max}")
        return self


class Engine(Settings):
    """How engines are built for a device."""

    runtime: Literal["tensorrt-rtx", "tensorrt"]
    built: Literal["here", "with-gpu", "on-device"]
    """Where: TensorRT-RTX needs no GPU to build. TensorRT builds for the one that it finds: here, if it is one of the
    target's, or else on the device, from a kit."""
    version_min: Version
    """First version of the runtime that will do."""
    version_below: Version
    """First version that is not known to do."""
    jetpack: str | None = None
    """JetPack releases that have such a runtime; None for what is no Jetson."""
    cpu: Literal["x86_64", "aarch64"] | None = None
    """Architecture of the device's CPU; None where there are devices of either."""
    compute_capabilities: tuple[Capability, ...] = Field(min_length=1)
    """GPUs that one plan is for."""
    possible_compute_capabilities: tuple[Capability, ...] = ()
    """All that this runtime can build our graphs for; none named where the device builds for itself."""
    precisions: tuple[Precision, ...]
    weight_types: tuple[Literal["int4", "int8", "fp8"], ...] = ()
    """What weights of few bits it multiplies as they are stored."""
    limits_of: str | None = None
    """Target whose limits hold where these are silent."""
    dims: dict[str, DimRange] = Field(default_factory=dict)
    """Limits per symbolic dimension."""
    values: dict[str, DimRange] = Field(default_factory=dict)
    """Limits per element of the inputs whose values are sizes."""

    @model_validator(mode="after")
    def _gpus_have_weight_types(self) -> "Engine":
        for kind in self.weight_types:
            first = WEIGHT_TYPES[kind].first_capability
            if early := [gpu for gpu in self.compute_capabilities if version_parts(gpu) < first]:
                least = ".".join(map(str, first))
                raise ValueError(f"weight_types: {kind} needs compute capability {least}, not {', '.join(early)}")
        return self

    @model_validator(mode="after")
    def _runtime_builds_there(self) -> "Engine":
        if self.built == "here" and self.runtime == "tensorrt":
            raise ValueError('TensorRT builds for the GPU that it finds: built must be "with-gpu" or "on-device"')
        if self.built == "with-gpu" and self.runtime != "tensorrt":
            raise ValueError('TensorRT-RTX needs no GPU to build: built must be "here"')
        if self.built != "here" and len(self.compute_capabilities) > 1:
            raise ValueError("a device builds for itself: compute_capabilities must name one")
        if empty := [name for name, limits in self.dims.items() if not limits.min]:
            raise ValueError(f"dims.{empty[0]}: TensorRT takes none of size 0: min must be at least 1")
        return self


class Device(Settings):
    """The data sheet of a board or card; a number alone is its memory."""

    memory: Positive
    """GB as sold."""
    bandwidth: Positive | None = None
    """GB of memory read a second."""
    tflops: Positive | None = None
    """Dense FP16 matrix products in the tensor cores, in TFLOP a second."""

    @model_validator(mode="before")
    @classmethod
    def _memory_alone(cls, given: Any) -> Any:
        return {"memory": given} if isinstance(given, int | float) else given


class Target(Settings):
    """One kind of device."""

    name: str
    devices: dict[str, Device] = Field(default_factory=dict)
    """Each such device by its name, smallest first."""
    shares_memory: bool = False
    """Whether CPU and GPU share that memory."""
    engine: Engine | None = None
    """None where the ONNX files are all there is to deliver."""

    def require_engine(self) -> Engine:
        """The engine settings, every compute capability among them possible.

        Raises:
            CapaError: the target has no engine, or lists a GPU that its runtime cannot build for.
        """
        if self.engine is None:
            raise CapaError(f"target {self.name} has no engine: its ONNX files are what runs", ExitCode.USAGE)
        possible = self.engine.possible_compute_capabilities
        for capability in self.engine.compute_capabilities:
            if possible and capability not in possible:
                raise CapaError(
                    f"target {self.name}: {self.engine.runtime} cannot build these graphs for "
                    f"compute capability {capability}; it can for {', '.join(possible)}",
                    ExitCode.ENGINE,
                )
        return self.engine

    def for_kit(self) -> "Target":
        """The target as one whose kit is written, wherever its engines could be built.

        Raises:
            CapaError: no kit is made for it.
        """
        engine = self.require_engine()
        if engine.built == "here":
            raise CapaError(f"--kit: engines for {self.name} are built here, without its GPU", ExitCode.USAGE)
        return self.model_copy(update={"engine": engine.model_copy(update={"built": "on-device"})})

    def require_precision(self, precision: Precision) -> None:
        """Refuse a precision that the target does not list.

        Raises:
            CapaError: the engine of this target cannot compute in `precision`.
        """
        if self.engine is not None and precision not in self.engine.precisions:
            raise CapaError(
                f"target {self.name} does not take {precision}; it takes {', '.join(self.engine.precisions)}",
                ExitCode.USAGE,
            )

    def require_packed_weights(self, packings: Mapping[str, PackedLayers]) -> None:
        """Refuse weights of few bits of a type that the target does not list.

        Args:
            packings: by the option that decides them.

        Raises:
            CapaError: the engine of this target would not multiply with them.
        """
        for option, packed in packings.items():
            self._require_packed(option, packed)

    def _require_packed(self, option: str, packed: PackedLayers) -> None:
        if self.engine is None or packed.kind in self.engine.weight_types:
            return
        refused = f"target {self.name} does not take {packed.type.name} weights"
        kinds = [kind for kind in self.engine.weight_types if kind in TYPES[option]]
        others = " or ".join(f"{option} {kind}" for kind in (*kinds, "none"))
        if not packed.type.in_engines:
            raise CapaError(
                f"{refused}, which TensorRT dequantizes at every run; build with {others}, or with --target onnx",
                ExitCode.USAGE,
            )
        first, gpus = packed.type.first_capability, self.engine.compute_capabilities
        if early := [gpu for gpu in gpus if version_parts(gpu) < first]:
            raise CapaError(
                f"{refused}: compute capability {', '.join(early)} has none; build with {others}, or for a target of "
                f"your own whose GPUs are {'.'.join(map(str, first))} and later",
                ExitCode.USAGE,
            )
        raise CapaError(
            f'{refused}; build with {others}, or say in its [engine] that it does: weight_types = ["{packed.kind}"]',
            ExitCode.USAGE,
        )

    def dim(self, name: str) -> DimRange:
        """Limits of a symbolic dimension; `past_kept_1` has those of `past_kept` unless it has its own.

        Raises:
            CapaError: the target says nothing about it.
        """
        dims = self.require_engine().dims
        limits = dims.get(name) or dims.get(re.sub(r"_\d+$", "", name))
        if limits is None:
            raise CapaError(
                f"target {self.name}: no limits for dimension {name}; add them to [engine.dims], which has "
                f"{', '.join(dims)}",
                ExitCode.ENGINE,
            )
        return limits


def load_target(target: str) -> Target:
    """The shipped target called `target`, or the one in the TOML file at that path.

    Raises:
        CapaError: no such target, or a file that is not a valid one.
    """
    return _load(target, ())


def _load(target: str, above: tuple[str, ...]) -> Target:
    """A target; `above` are those whose limits it is to give."""
    path = Path(target) if target.endswith(".toml") else shipped("engines") / f"{target}.toml"
    if not target.endswith(".toml") and target not in shipped_names("engines"):
        raise CapaError(
            f"unknown target {target!r}; known targets: {', '.join(shipped_names('engines'))}, "
            "or the path of a .toml target",
            ExitCode.USAGE,
        )
    read = read_toml(path, Target, name=path.stem)
    if read.engine is None or read.engine.limits_of is None:
        return read
    if target in above:
        raise CapaError(f"{path}: limits_of leads back to it; name a target with limits of its own", ExitCode.USAGE)
    base = _load(read.engine.limits_of, (*above, target)).require_engine()
    limits = {"dims": {**base.dims, **read.engine.dims}, "values": {**base.values, **read.engine.values}}
    return read.model_copy(update={"engine": read.engine.model_copy(update=limits)})


def version_parts(version: str) -> tuple[int, ...]:
    """Numbers of a version, to compare."""
    return tuple(int(part) for part in re.findall(r"\d+", version))
