"""What plugins launch, run by value over a driver that stands in for CUDA's: Python's and the library's."""

import os
import sys
from pathlib import Path

import pytest
import torch

from capa_export.kernels import contribution_score, token_gather, topk_keep, visual_scale
from tests.kernels.plugins.conftest import HERE, shell
from tests.kernels.plugins.execute_launches import BENCHMARK
from tests.kernels.test_contribution_score import case as score_case
from tests.kernels.test_token_gather import bits as gather_bits
from tests.kernels.test_topk_keep import prompts
from tests.kernels.test_visual_scale import case as scale_case

ROOT = HERE.parents[2]
RTOL = {"ContributionScore": 4e-6}
"""As in `tests/kernels/ptx/test_operators.py`; the others are equal to the bit."""


def calls(real: torch.dtype, head_size: int) -> list[tuple[dict[str, object], tuple[torch.Tensor, ...]]]:
    """One call of every operator, and what it is to compute; no two sizes are equal."""
    kept = torch.tensor([[0, 5, 6, 40, 44]])
    gathered = {name: one.to(real) for name, one in gather_bits(1, 45, 144, 2, head_size, 40).items()}
    cases = [
        (contribution_score, score_case(4, 2, head_size, 70, 144, num_text=3, real=real), {"scale": 0.125}),
        (topk_keep, {"scores": prompts(300), "num_keep": torch.tensor([77])}, {"min_keep_per_image": 1}),
        (token_gather, gathered | {"kept": kept}, {}),
        (visual_scale, scale_case(37, 1040, num_text=3, real=real), {}),
    ]
    result: list[tuple[dict[str, object], tuple[torch.Tensor, ...]]] = []
    for module, inputs, attributes in cases:
        expected = module.reference(**inputs, **attributes)
        expected = expected if isinstance(expected, tuple) else (expected,)
        outputs = dict(zip(module.OPERATOR.outputs, map(torch.zeros_like, expected), strict=True))
        call = {"operator": module.OPERATOR.name, "inputs": inputs, "attributes": attributes, "outputs": outputs}
        result.append((call, expected))
    return result


ALL = [
    *calls(torch.float16, 64),
    *calls(torch.bfloat16, 80),
    *calls(torch.float32, 32),
]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `libcuda.so.1` and the calls."""
    folder = tmp_path_factory.mktemp("driver")
    flags = ["-Wall", "-Wextra", "-Werror", "-Wl,-soname,libcuda.so.1"]
    shell("gcc", *flags, "-shared", "-fPIC", HERE / "executing_driver.c", "-o", folder / "libcuda.so.1")
    torch.save([call for call, _ in ALL], folder / "calls.pt")
    return folder


def run(folder: Path, **environment: str) -> None:
    """Run the calls in a process that finds the driver, and hold the outputs against the references."""
    command = [sys.executable, "-m", "tests.kernels.plugins.execute_launches", str(folder)]
    shell(*command, env=os.environ | {"LD_LIBRARY_PATH": str(folder), "SM": "87"} | environment, cwd=ROOT)
    outputs = torch.load(folder / "outputs.pt")
    assert len(outputs) == len(ALL) == 12
    for (call, expected), found in zip(ALL, outputs, strict=True):
        for one, other in zip(found.values(), expected, strict=True):
            name = str(call["operator"])
            torch.testing.assert_close(one, other, rtol=RTOL.get(name, 0), atol=0, equal_nan=True)


@pytest.mark.slow
def test_python_plugins_compute_the_operators(driver: Path) -> None:
    run(driver)


@pytest.mark.slow
def test_the_plugins_of_the_library_compute_the_operators(driver: Path, library: Path, include: Path) -> None:
    stubs = ROOT / "engines" / "plugins" / "stubs"
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{stubs}", "-isystem", include]
    shell("g++", *flags, BENCHMARK / "plugin.cpp", "-o", driver / "plugin.so", "-ldl")
    run(driver, LIBRARY=str(library))
