"""Ahead-of-time compilation, where neither a GPU nor a driver is."""

import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from capa_export.base.errors import CapaError
from capa_export.kernels import OPERATORS, visual_scale
from capa_export.kernels import compile as compile_module
from capa_export.kernels.compile import CompiledKernel, compile_kernels, has_real, variant_name
from tests.orphans import SLEEPER, ended_with_parent

VISUAL_SCALE = visual_scale.OPERATOR


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def kernels(cache: Path) -> list[CompiledKernel]:
    return compile_kernels([VISUAL_SCALE], ["8.6", "8.0"], ptx=True)


def sm(image: bytes) -> int:
    """What the ELF header of a cubin says it runs on."""
    return struct.unpack_from("<I", image, 48)[0] & 0xFF


def test_a_variant_is_one_image_for_one_gpu(kernels: list[CompiledKernel]) -> None:
    assert {(one.variant, one.compute_capability, one.kind) for one in kernels} == {
        (f"merge_rows.{dtype}", capability, kind)
        for dtype in ("fp16", "bf16", "fp32")
        for capability, kind in (("8.6", "cubin"), ("8.0", "cubin"), ("8.0", "ptx"))
    }
    assert len({one.image for one in kernels}) == len(kernels) == 9
    for one in kernels:
        assert (one.operator, one.name, one.warps) == ("VisualScale", "merge_rows", 4)
        assert 16 <= one.registers <= 255
        assert one.spill_bytes == one.stack_bytes == 0
        if one.kind == "cubin":
            assert one.image.startswith(b"\x7fELF")
            assert sm(one.image) == {"8.6": 86, "8.0": 80}[one.compute_capability]
        else:
            text = one.image.decode()
            assert ".target sm_80" in text
            parameters = re.search(r"\.visible \.entry merge_rows\((.*?)\)", text, re.DOTALL)
            # Five pointers, three counts, and the pointers of Triton's.
            assert (
                parameters
                and re.findall(r"\.param \.(\w+)", parameters[1])
                == ["u64"] * 5 + ["u32"] * 3 + ["u64"] * one.null_pointers
            )


def test_pointers_and_aligned_sizes_give_wide_loads(kernels: list[CompiledKernel]) -> None:
    ptx = next(one.image.decode() for one in kernels if one.kind == "ptx")
    assert "ld.global.v4" in ptx
    assert "st.global.v4" in ptx


def test_what_was_compiled_before_takes_no_process(
    kernels: list[CompiledKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compile_module, "subprocess", None)
    told: list[tuple[int, int]] = []
    again = compile_kernels([VISUAL_SCALE], ["8.0"], dtypes=["bf16"], progress=lambda *counts: told.append(counts))
    assert again == [
        one for one in kernels if (one.variant, one.compute_capability, one.kind) == ("merge_rows.bf16", "8.0", "cubin")
    ]
    assert told == [(1, 1)]


def test_progress_ends_at_all(cache: Path) -> None:
    told: list[tuple[int, int]] = []
    compile_kernels([VISUAL_SCALE], ["8.9"], progress=lambda *counts: told.append(counts))
    assert told[0] == (0, 3)
    assert told[-1] == (3, 3)
    assert told == sorted(told)


def test_changed_sources_or_another_triton_are_another_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    before = compile_module._digest_of_sources()
    assert before == compile_module._digest_of_sources()
    monkeypatch.setattr(compile_module.triton, "__version__", "3.10.0")
    assert before != compile_module._digest_of_sources()


def test_names_hold_what_a_kernel_is_compiled_for() -> None:
    names = {
        variant_name(launch, "bf16" if has_real(operator, launch) else None, {"head_size": 96})
        for operator in OPERATORS
        for launch in operator.launches(operator.symbols(dict.fromkeys(operator.compiled_sizes, 96)))
    }
    assert {"merge_rows.bf16", "softmax", "written_squares.bf16.96", "order_tokens"} <= names
    assert all(re.fullmatch(r"[a-z_]+(\.bf16)?(\.96)?", name) for name in names)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"compute_capabilities": ["8.6", "7.5"]}, "no kernels for compute capability 7.5; there are for 8.0, 8.6, "),
        ({"head_sizes": [72]}, "no kernels for head size 72; there are for 32, 64, 80, 96, 128"),
    ],
)
def test_what_kernels_are_not_written_for_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(CapaError, match=message):
        compile_kernels([VISUAL_SCALE], **{"compute_capabilities": ["8.6"], **given})


def test_what_triton_refuses_is_said_in_one_line(cache: Path) -> None:
    (launch,) = VISUAL_SCALE.launches(VISUAL_SCALE.symbols({}))
    broken = replace(VISUAL_SCALE, launches=lambda _: [replace(launch, constants={**launch.constants, "ROWS": 3})])
    with pytest.raises(CapaError, match=r"Triton 3\..* failed on the kernels: .*power of 2") as caught:
        compile_kernels([broken], ["8.6"], dtypes=["fp16"])
    assert "\n" not in str(caught.value)


def test_without_triton_the_extra_is_named() -> None:
    script = "import sys; sys.modules['triton'] = None; from capa_export.kernels import OPERATORS"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1].endswith(
        'CapaError: kernels need triton: pip install ".[rtx]" in a checkout of capa-export'
    )


@pytest.mark.slow
def test_all_kernels_compile_for_the_oldest_and_the_newest_gpus(cache: Path) -> None:
    kernels = compile_kernels(OPERATORS, ["8.7", "11.0", "12.1"], dtypes=["fp16"], head_sizes=[80, 128])
    by_variant = {one.variant for one in kernels}
    assert len(kernels) == 3 * len(by_variant)
    assert {one.operator for one in kernels} == {operator.name for operator in OPERATORS}
    for one in kernels:
        # No GPU of them has more than 99 KiB for one block.
        assert one.shared_bytes <= 99 * 1024, one.variant
        assert 32 * one.warps * one.registers <= 65536, one.variant


COMPILING = """
import sys
from pathlib import Path
from capa_export.kernels import compile
given = {"signature": {}, "constants": {}, "aligned": [], "warps": 1, "compute_capability": "8.6"}
job = compile._Job(module="sleeper", function="", **given)
compile._run({Path(sys.path[-1], "result"): job}, None)
"""


def test_compiling_ends_with_a_command_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    where = os.pathsep.join([*filter(None, sys.path), str(tmp_path)])
    assert ended_with_parent(COMPILING, tmp_path, 2, {"PYTHONPATH": where})
