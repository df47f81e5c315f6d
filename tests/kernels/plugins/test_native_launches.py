"""What the plugin library launches.

A driver that only takes notes shows the order of calls and their arguments, and nothing of what a GPU would compute.
"""

import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import pytest

from capa_export.base.precision import Precision
from capa_export.kernels import OPERATORS
from capa_export.kernels.compile import CompiledKernel, has_real, variant_name
from capa_export.kernels.operator import Launch, Operator
from tests.kernels.plugins.conftest import HERE, shell

OPERATOR = {operator.name: operator for operator in OPERATORS}


@pytest.fixture(scope="module")
def driver(library: Path, include: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `libcuda.so.1` and `enqueue`."""
    folder = tmp_path_factory.mktemp("driver")
    flags = ["-Wall", "-Wextra", "-Werror"]
    shell("gcc", *flags, "-shared", "-fPIC", HERE / "recording_driver.c", "-o", folder / "libcuda.so.1")
    stubs = Path(__file__).parents[3] / "engines" / "plugins" / "stubs"
    headers = [f"-I{stubs}", "-isystem", include]
    shell("g++", "-std=c++17", *flags, *headers, HERE / "enqueue.cpp", "-o", folder / "enqueue", "-ldl")
    return folder


Shapes: TypeAlias = Mapping[str, Sequence[int]]
Said: TypeAlias = dict[str, list[str]]
TOPK: Shapes = {"scores": (300,), "num_keep": (1,)}
SCORE: Shapes = {
    "query": (1, 28, 1, 128),
    "key": (1, 4, 1000, 128),
    "value": (1, 4, 1000, 128),
    "output_weight": (3584, 3584),
    "text_positions": (63,),
}
SMALL_SCORE = SCORE | {
    "query": (1, 4, 1, 80),
    "key": (1, 4, 17, 80),
    "value": (1, 4, 17, 80),
    "output_weight": (320, 320),
}
GATHER: Shapes = {
    "hidden": (1000, 2048),
    "key": (1, 2, 1000, 128),
    "value": (1, 2, 1000, 128),
    "cos": (1, 1000, 128),
    "sin": (1, 1000, 128),
    "kept": (255,),
}
SCALE: Shapes = {"x": (1000, 3584), "scale": (3584,), "text": (63, 3584), "text_rows": (63,)}
CALLS: list[tuple[str, Shapes, dict[str, float], int]] = [
    ("ContributionScore", SCORE, {"scale": 0.08838834764}, 0),
    ("ContributionScore", SMALL_SCORE, {"scale": 0.1118}, 0),
    ("TopKKeep", TOPK, {"min_keep_per_image": 0}, 75),
    ("TopKKeep", {**TOPK, "scores": (16384,)}, {"min_keep_per_image": 4}, 12288),
    ("TokenGather", GATHER, {}, 0),
    ("TokenGather", {**GATHER, "kept": (0,)}, {}, 0),
    ("VisualScale", SCALE, {}, 0),
    ("VisualScale", {**SCALE, "x": (1, 3584), "text": (0, 3584), "text_rows": (0,)}, {}, 0),
]


@dataclass
class Call:
    """One run of an operator, and what its table says of it."""

    operator: Operator
    shapes: Shapes
    attributes: dict[str, float]
    kept: int
    real: Precision

    def __post_init__(self) -> None:
        inputs = {name: tensor for name, tensor in self.operator.inputs.items() if name in self.shapes}
        with_batch = {
            name: shape if len(shape) == len(inputs[name].shape) else (1, *shape) for name, shape in self.shapes.items()
        }
        self.size = self.operator.sizes(with_batch, dict.fromkeys(self.operator.value_inputs, self.kept))
        on_gpu = [name for name in inputs if name not in self.operator.value_inputs]
        self.addresses = {name: (index + 1) * 0x1000 for index, name in enumerate(on_gpu)}
        self.addresses |= {name: (index + 1) * 0x100000 for index, name in enumerate(self.operator.outputs)}
        self.workspace = 0
        for name, scratch in self.operator.scratch(self.size).items():
            self.addresses[name] = 0x10000000 + self.workspace
            assert isinstance(scratch.count, int)
            self.workspace += -(-scratch.count * {"fp32": 4, "int64": 8}[scratch.dtype] // 256) * 256

    def text(self) -> str:
        """As `enqueue` reads it."""
        lines = [f"call {self.operator.name}"]
        for name, value in self.attributes.items():
            lines.append(f"{self.operator.attributes[name].__name__} {name} {value!r}")
        for kind, tensors in (("in", self.operator.inputs), ("out", self.operator.outputs)):
            for name, tensor in tensors.items():
                if name not in self.operator.value_inputs:
                    shape = [one if isinstance(one, int) else getattr(self.size, one) for one in tensor.graph_shape]
                    lines.append(" ".join([kind, tensor.dtype.replace("real", self.real), *map(str, shape)]))
        return "\n".join([*lines, "run", ""])

    def bits(self, attribute: str) -> int:
        kind = {int: "i", float: "f"}[self.operator.attributes[attribute]]
        return struct.unpack("<I", struct.pack(f"<{kind}", self.attributes[attribute]))[0]

    def launches(self) -> Iterator[tuple[str, Launch, list[int]]]:
        """Variant, launch, and arguments, those with work only."""
        known = {name: getattr(self.size, name) for name in self.operator.compiled_sizes}
        for launch in self.operator.launches(self.size):
            args = [
                arg
                if not isinstance(arg, str)
                else self.bits(arg)
                if arg in self.operator.attributes
                else self.addresses[arg]
                for arg in launch.args
            ]
            if 0 not in launch.grid:
                variant = variant_name(launch, self.real if has_real(self.operator, launch) else None, known)
                yield variant, launch, args  # pyright: ignore[reportReturnType]  # No symbol.


def enqueue(library: Path, driver: Path, call: Call, kernels: list[CompiledKernel], gpu: str, **env: str) -> Said:
    """What was said, by first word."""
    parameters = ";".join(f"{name} {sizes}" for name, sizes in parameter_bytes(kernels).items())
    driver_env = {"LD_LIBRARY_PATH": str(driver), "KERNELS": parameters, "SM": gpu.replace(".", "")}
    said: Said = {}
    for line in shell(driver / "enqueue", library, input=call.text(), env=driver_env | env).splitlines():
        word, _, rest = line.partition(" ")
        said.setdefault(word, []).append(rest)
    return said


def parameter_bytes(kernels: list[CompiledKernel]) -> dict[str, str]:
    """Sizes of every kernel's parameters, from its PTX: what a GPU would read of a launch."""
    sizes: dict[str, str] = {}
    for kernel in kernels:
        if kernel.kind == "ptx":
            text = kernel.image.decode()
            found = re.findall(rf"\.param \.[bfu](32|64)[^,)]* {kernel.name}_param_\d+", text)
            assert found
            sizes[kernel.name] = " ".join(str(int(bits) // 8) for bits in found)
    return sizes


def checksum(fatbin: bytes) -> str:
    total = 0
    for byte in fatbin:
        total = (total * 31 + byte) & 0xFFFFFFFF
    return str(total)


@pytest.mark.slow
@pytest.mark.parametrize("real", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize(
    ("gpu", "image"),
    # Images of 8.6 run on 8.9, but not on Orin; those of 12.0 nowhere else.
    [("8.6", "8.6"), ("8.9", "8.6"), ("12.0", "12.0"), ("8.0", None), ("8.7", None), ("12.1", None)],
)
def test_a_call_launches_what_the_operator_lists(
    library: Path,
    driver: Path,
    sources: Path,
    kernels: list[CompiledKernel],
    real: Precision,
    gpu: str,
    image: str | None,
) -> None:
    compiled = {
        one.variant: one for one in kernels if (one.compute_capability == image if image else one.kind == "ptx")
    }
    for name, shapes, attributes, kept in CALLS:
        call = Call(OPERATOR[name], shapes, attributes, kept, real)
        said = enqueue(library, driver, call, kernels, gpu)
        expected, allowed, images = [], [], []
        for variant, launch, args in call.launches():
            kernel = compiled[variant]
            assert kernel.warps == launch.warps
            null_pointers = [0] * kernel.null_pointers
            numbers = (*launch.grid, 32 * launch.warps, 1, 1, kernel.shared_bytes, 0x77, 0, *args, *null_pointers)
            expected.append(" ".join(map(str, (kernel.name, *numbers))))
            images.append(checksum((sources / "kernels" / f"{variant}.fatbin").read_bytes()))
            if kernel.shared_bytes > 48 * 1024:
                allowed.append(f"8 {kernel.shared_bytes} {kernel.name} 0")
        assert said.get("launch", []) == expected
        assert said.get("load", []) == images
        assert said.get("attribute", []) == allowed
        assert said["workspace"] == [str(call.workspace)]
        assert (said["configure"], said["enqueue"]) == (["0"], ["0"])
        assert set(said["formats"][0].split()) == {"1"}
        types = {int: 5, float: 1}  # nvinfer1::PluginFieldType
        fields = [f"{one} {types[kind]} {call.bits(one)}" for one, kind in call.operator.attributes.items()]
        assert said.get("field", []) == fields
        warning = f"2 capa: no kernel image for SM {gpu}: the driver compiles PTX"
        assert said.get("log", []) == ([] if image else [warning])


def scale_call(**shapes: Sequence[int]) -> Call:
    return Call(OPERATOR["VisualScale"], SCALE | shapes, {}, 0, "fp16")


@pytest.mark.slow
def test_what_goes_wrong_is_said_in_one_line(
    library: Path, driver: Path, kernels: list[CompiledKernel], tmp_path: Path
) -> None:
    def error(call: Call, folder: Path = driver, **env: str) -> str:
        said = enqueue(library, folder, call, kernels, "8.6", **env)
        assert said["enqueue"] == ["1"]
        severity, _, message = said["log"][-1].partition(" ")
        assert severity == "1"
        return message

    failed = "it was told to fail (700)"
    assert error(scale_call(), FAIL="cuLaunchKernel") == (
        f"capa::VisualScale: kernel merge_rows.fp16: cuLaunchKernel: {failed}"
    )
    assert error(scale_call(), FAIL="cuInit") == f"capa::VisualScale: cuInit: {failed}"
    assert "cuLibraryLoadData: " + failed in error(scale_call(), FAIL="cuLibraryLoadData")

    (tmp_path / "enqueue").symlink_to(driver / "enqueue")
    assert error(scale_call(), tmp_path).startswith("capa::VisualScale: no CUDA driver: libcuda.so.1: cannot open")
    shell("gcc", "-shared", "-x", "c", "/dev/null", "-o", tmp_path / "libcuda.so.1")
    assert "libcuda.so.1 has no cuInit: the driver is older than CUDA 12.0" in error(scale_call(), tmp_path)
