"""The plugin library: what it is made of, what it exports and needs, how TensorRT takes it, and what it launches.

TensorRT's headers come from the folder that the environment variable TENSORRT_INCLUDE names.
"""

import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from typer.testing import CliRunner

from capa_export.cli_plugins import plugins
from capa_export.errors import CapaError
from capa_export.kernels import OPERATORS
from capa_export.kernels.compile import CompiledKernel, HalfDtype, compile_kernels, has_half, variant_name
from capa_export.kernels.operator import Launch, Operator
from capa_export.plugins.alias import ensure_parser_library
from capa_export.plugins.native import LIBRARY, build_library, find_headers, write_sources

HERE = Path(__file__).parent
OPERATOR = {operator.name: operator for operator in OPERATORS}
CAPABILITIES = ("8.6", "12.0")
IMAGE_HEADER_BYTES = 16
ENTRY_POINTS = {"getCreators", "setLoggerFinder"}
JETPACK_6_GLIBC = (2, 35)


@pytest.fixture(scope="module")
def include() -> Path:
    folder = os.environ.get("TENSORRT_INCLUDE")
    if not folder:
        pytest.skip(
            "no plugin library was compiled: set TENSORRT_INCLUDE to the include folder of TensorRT 10.3 to 11; "
            "its headers are in the public repository NVIDIA/TensorRT"
        )
    return Path(folder)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources") / "plugins"
    write_sources(folder, CAPABILITIES)
    return folder


@pytest.fixture(scope="module")
def kernels() -> list[CompiledKernel]:
    compiled = compile_kernels(OPERATORS, ["8.0", *CAPABILITIES], ptx=True)
    return [one for one in compiled if one.kind == "ptx" or one.compute_capability in CAPABILITIES]


@pytest.fixture(scope="module")
def library(include: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built by the command."""
    out = tmp_path_factory.mktemp("library")
    arguments = ["build", "--tensorrt-include", str(include), "--out", str(out), "--json"]
    run = CliRunner().invoke(plugins, [*arguments, "--compute-capabilities", ",".join(CAPABILITIES)])
    assert run.exit_code == 0, run.output
    said = json.loads(run.stdout)
    assert Path(said["path"]) == out / LIBRARY
    assert said["bytes"] == (out / LIBRARY).stat().st_size
    assert said["compute_capabilities"] == list(CAPABILITIES)
    # Nothing that the build needed is left.
    assert [path.name for path in out.iterdir()] == [LIBRARY]
    return out / LIBRARY


def shell(*command: str | Path, **options: Any) -> str:
    run = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


# What is written for a compiler.


@pytest.mark.slow
def test_the_sources_are_complete_and_the_same_each_time(sources: Path, tmp_path: Path) -> None:
    write_sources(tmp_path / "again", CAPABILITIES)
    files = {path.relative_to(sources) for path in sources.rglob("*") if path.is_file()}
    assert files == {path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*") if path.is_file()}
    for file in files:
        assert (sources / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file
    assert {str(one) for one in files if one.parent.name != "kernels"} >= {
        *("build.sh", "capa_plugin.cpp", "capa_plugins.map", "capa_kernels.h", "capa_kernels.s"),
        "stubs/cuda_runtime_api.h",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


@pytest.mark.slow
def test_a_fatbin_holds_every_cubin_and_the_ptx(sources: Path, kernels: list[CompiledKernel]) -> None:
    for path in (sources / "kernels").iterdir():
        data = path.read_bytes()
        magic, _, header_bytes, size = struct.unpack_from("<IHHQ", data)
        assert (magic, header_bytes, size + IMAGE_HEADER_BYTES) == (0xBA55ED50, IMAGE_HEADER_BYTES, len(data))
        own = [kernel for kernel in kernels if kernel.variant == path.stem]
        assert [kernel.kind for kernel in own].count("cubin") == len(CAPABILITIES)
        for kernel in own:
            # PTX goes in without its comments.
            parts = (
                [kernel.image] if kernel.kind == "cubin" else [b".target sm_80\n", f".entry {kernel.name}(".encode()]
            )
            assert all(part in data for part in parts), (kernel.variant, kernel.compute_capability, kernel.kind)
    assert {path.stem for path in (sources / "kernels").iterdir()} == {kernel.variant for kernel in kernels}


@pytest.mark.slow
def test_a_folder_that_is_in_use_is_left_alone(sources: Path) -> None:
    with pytest.raises(CapaError, match="is there already: give a folder that is new or empty"):
        write_sources(sources, CAPABILITIES)


def test_gpus_without_kernels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CapaError, match=r"no kernels for compute capability 7\.5; there are for 8\.0, 8\.6"):
        write_sources(tmp_path / "a", ["7.5"])
    with pytest.raises(CapaError, match=r"needs a compute capability, such as 8\.7"):
        write_sources(tmp_path / "a", [])
    assert not list(tmp_path.iterdir())


# What the compiler makes of it.


@pytest.mark.slow
def test_the_library_exports_its_entry_points_and_needs_no_cuda_tensorrt_or_python(library: Path) -> None:
    symbols = shell("nm", "-D", "--defined-only", library).split("\n")
    assert {line.split()[-1] for line in symbols if line} == ENTRY_POINTS
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", shell("readelf", "-d", library))
    assert set(needed) <= {"libc.so.6", "libgcc_s.so.1", "libm.so.6", "libdl.so.2", "ld-linux-x86-64.so.2"}


@pytest.mark.slow
def test_the_library_has_no_executable_stack(library: Path) -> None:
    (line,) = (one for one in shell("readelf", "-lW", library).splitlines() if "GNU_STACK" in one)
    assert " RW " in line


@pytest.mark.slow
def test_a_library_for_jetson_is_compiled_here(include: Path, tmp_path: Path) -> None:
    try:
        built = build_library(
            tmp_path / "orin.so", compute_capabilities=["8.6"], tensorrt_include=include, arch="aarch64"
        )
    except CapaError as error:
        if "no compiler" in str(error):
            pytest.skip(f"no library was compiled for aarch64: {error}")
        raise
    assert built.path == tmp_path / "orin.so"
    assert re.search(r"Machine: +AArch64", shell("readelf", "-h", built.path))
    assert "ARM aarch64" in shell("file", built.path)
    versions = re.findall(r"\bGLIBC_(\d+)\.(\d+)", shell("readelf", "-V", built.path))
    assert max((int(major), int(minor)) for major, minor in versions) <= JETPACK_6_GLIBC
    assert "GLIBCXX" not in shell("readelf", "-V", built.path)


@pytest.mark.slow
def test_the_compilers_first_error_is_told_and_its_log_kept(include: Path, tmp_path: Path) -> None:
    compiler = tmp_path / "broken-g++"
    compiler.write_text("#!/bin/sh\necho x.cpp: note\necho x.cpp:1: error: it is broken >&2\nexit 1\n", "ascii")
    compiler.chmod(0o755)
    out = tmp_path / "out"
    with pytest.raises(CapaError, match=r"broken-g\+\+ failed: x\.cpp:1: error: it is broken; see .*\.log$"):
        build_library(out, compute_capabilities=["8.6"], tensorrt_include=include, cxx=str(compiler))
    assert [path.name for path in out.iterdir()] == ["libcapa_plugins.log"]
    assert (out / "libcapa_plugins.log").read_text("utf-8").startswith("x.cpp: note\n")


# What is refused before anything is compiled.


def fake_headers(folder: Path, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "NvInferVersion.h").write_text(text, "ascii")
    return folder


def versioned_headers(folder: Path, version: str) -> Path:
    major, minor = version.split(".")
    return fake_headers(folder, f"#define NV_TENSORRT_MAJOR {major} //!< x\n#define NV_TENSORRT_MINOR {minor}\n")


@pytest.mark.parametrize("version", ["9.3", "10.2", "12.0"])
def test_headers_of_other_versions_are_refused(tmp_path: Path, version: str) -> None:
    folder = versioned_headers(tmp_path, version)
    with pytest.raises(CapaError, match=rf"has the headers of TensorRT {version}; the plugins take 10\.3 to 11"):
        build_library(tmp_path / "out", compute_capabilities=["8.6"], tensorrt_include=folder)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("version", ["10.3", "10.16", "11.9"])
def test_headers_of_known_versions_are_taken(tmp_path: Path, version: str) -> None:
    assert find_headers(versioned_headers(tmp_path, version), "x86_64") == (tmp_path, version)


def test_the_headers_of_tensorrt_rtx_say_which_tensorrt_they_are(tmp_path: Path) -> None:
    text = "#define TRT_MAJOR_RTX 1\n#define TRT_MINOR_RTX 3\n#define NV_TENSORRT_MAJOR TRT_MAJOR_RTX\n"
    enterprise = "#define TRT_MAJOR_ENTERPRISE 10\n#define TRT_MINOR_ENTERPRISE 15\n"
    assert find_headers(fake_headers(tmp_path, text + enterprise), "x86_64")[1] == "10.15"
    with pytest.raises(CapaError, match="names no version of TensorRT"):
        find_headers(fake_headers(tmp_path, text), "x86_64")


@pytest.mark.parametrize("arch", ["x86_64", "aarch64"])
def test_missing_headers_are_told_with_where_they_usually_lie(tmp_path: Path, arch: str) -> None:
    with pytest.raises(CapaError, match=rf"no TensorRT headers .* in {tmp_path}: .*/usr/include/{arch}-linux-gnu.*DIR"):
        find_headers(tmp_path, arch)


def test_an_unknown_cpu_and_a_missing_compiler_are_refused(tmp_path: Path) -> None:
    headers = versioned_headers(tmp_path, "10.3")
    with pytest.raises(CapaError, match="no plugin library for riscv64; there is one for x86_64, aarch64"):
        build_library(tmp_path, compute_capabilities=["8.6"], tensorrt_include=headers, arch="riscv64")
    with pytest.raises(CapaError, match=r"no compiler no-such-g\+\+: apt install g\+\+.* or pass --cxx COMPILER"):
        build_library(tmp_path, compute_capabilities=["8.6"], tensorrt_include=headers, cxx="no-such-g++")


# How TensorRT takes it.


@pytest.mark.trt
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_tensorrt_builds_the_four_operators_as_plugin_layers(library: Path, precision: str, tmp_path: Path) -> None:
    built = build_with_tensorrt(library, precision, 64, tmp_path)
    assert built["parsed"], built
    assert built["layers"] == ["PLUGIN_V3"] * 4
    assert built["types"] == {"y": "HALF" if precision == "fp16" else "BF16", "kept": "INT64"}
    assert built["shapes"] == {"y": [-1, 64], "kept": [-1]}
    # The library lies in the plan; the rest is alignment.
    assert 0 <= built["plan_with_library"] - built["plan"] - library.stat().st_size < 1024


@pytest.mark.trt
@pytest.mark.slow
def test_sizes_that_kernels_cannot_do_fail_the_build_and_say_why(library: Path, tmp_path: Path) -> None:
    built = build_with_tensorrt(library, "fp16", 72, tmp_path)
    assert built["plan"] is None
    assert "capa::ContributionScore: hidden_size is 72, not a multiple of 16\n" in built["log"]


def build_with_tensorrt(library: Path, precision: str, hidden_size: int, folder: Path) -> dict[str, Any]:
    command = [sys.executable, HERE / "build_plan.py", library, precision, str(hidden_size)]
    environment = os.environ | ensure_parser_library(folder)
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return {**json.loads(run.stdout.splitlines()[-1]), "log": run.stdout + run.stderr}


# What it launches. A driver that only takes notes shows the order of calls and their arguments, and nothing of what a
# GPU would compute.


@pytest.fixture(scope="module")
def driver(library: Path, include: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `libcuda.so.1` and `enqueue`."""
    folder = tmp_path_factory.mktemp("driver")
    flags = ["-Wall", "-Wextra", "-Werror"]
    shell("gcc", *flags, "-shared", "-fPIC", HERE / "recording_driver.c", "-o", folder / "libcuda.so.1")
    stubs = Path(__file__).parents[2] / "engines" / "plugins" / "stubs"
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
    half: HalfDtype

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
                    lines.append(" ".join([kind, tensor.dtype.replace("half", self.half), *map(str, shape)]))
        return "\n".join([*lines, "run", ""])

    def bits(self, attribute: str) -> int:
        kind = {int: "i", float: "f"}[self.operator.attributes[attribute]]
        return struct.unpack("<I", struct.pack(f"<{kind}", self.attributes[attribute]))[0]

    def launches(self) -> Iterator[tuple[str, Launch, list[int]]]:
        """Variant, launch, and parameters, those with work only."""
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
                variant = variant_name(launch, self.half if has_half(self.operator, launch) else None, known)
                # The last two are pointers to memory that Triton might need, and these kernels do not.
                yield variant, launch, [*args, 0, 0]  # pyright: ignore[reportReturnType]  # No symbol.


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
@pytest.mark.parametrize("half", ["fp16", "bf16"])
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
    half: HalfDtype,
    gpu: str,
    image: str | None,
) -> None:
    compiled = {
        one.variant: one for one in kernels if (one.compute_capability == image if image else one.kind == "ptx")
    }
    for name, shapes, attributes, kept in CALLS:
        call = Call(OPERATOR[name], shapes, attributes, kept, half)
        said = enqueue(library, driver, call, kernels, gpu)
        expected, allowed, images = [], [], []
        for variant, launch, args in call.launches():
            kernel = compiled[variant]
            assert kernel.warps == launch.warps
            numbers = (*launch.grid, 32 * launch.warps, 1, 1, kernel.shared_bytes, 0x77, 0, *args)
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
