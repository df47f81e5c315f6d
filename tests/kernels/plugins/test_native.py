"""The plugin library: what it is made of, what it exports and needs, and how TensorRT takes it."""

import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from capa_export.base.errors import CapaError
from capa_export.kernels.compile import CompiledKernel
from capa_export.kernels.plugins.alias import ensure_parser_library
from capa_export.kernels.plugins.native import build_library, find_headers, write_sources
from tests.kernels.plugins.conftest import CAPABILITIES, HERE, shell

IMAGE_HEADER_BYTES = 16
ENTRY_POINTS = {"capaTensorRTHeaders", "getCreators", "setLoggerFinder"}
JETPACK_6_GLIBC = (2, 35)


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
@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_tensorrt_builds_the_four_operators_as_plugin_layers(library: Path, precision: str, tmp_path: Path) -> None:
    built = build_with_tensorrt(library, precision, 64, tmp_path)
    assert built["parsed"], built
    assert built["layers"] == ["PLUGIN_V3"] * 4
    assert built["types"] == {"y": {"fp16": "HALF", "bf16": "BF16", "fp32": "FLOAT"}[precision], "kept": "INT64"}
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
