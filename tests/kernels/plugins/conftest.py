"""The plugin library, compiled once.

TensorRT's headers come from the folder that the environment variable TENSORRT_INCLUDE names.
"""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from capa_export.cli.plugins import plugins
from capa_export.kernels import OPERATORS
from capa_export.kernels.compile import CompiledKernel, compile_kernels
from capa_export.kernels.plugins.native import LIBRARY, write_sources
from tests.headers import headers_of_tensorrt

HERE = Path(__file__).parent
CAPABILITIES = ("8.6", "12.0")


@pytest.fixture(scope="session")
def include() -> Path:
    return headers_of_tensorrt()


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources") / "plugins"
    write_sources(folder, CAPABILITIES)
    return folder


@pytest.fixture(scope="session")
def kernels() -> list[CompiledKernel]:
    compiled = compile_kernels(OPERATORS, ["8.0", *CAPABILITIES], ptx=True)
    return [one for one in compiled if one.kind == "ptx" or one.compute_capability in CAPABILITIES]


@pytest.fixture(scope="session")
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
