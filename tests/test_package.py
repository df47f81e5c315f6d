"""The wheel: what is in it, and that it works where there is no checkout."""

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

import capa_export

CHECKOUT = Path(__file__).parents[1]
DATA = ("graphs", "engines")
TINY = "capa_export/graphs/checkpoints/tiny-qwen25vl/"
EXPECTED = {
    "capa_export/cli/__init__.py",
    "capa_export/trt/worker.py",
    "capa_export/trt/builder.py",
    "capa_export/trt/golden_run.py",
    "capa_export/trt/kit_device.py",
    "capa_export/trt/kit_file.py",
    "capa_export/trt/kit_switch.py",
    "capa_export/base/parent.py",
    "capa_export/trt/kit_inputs.py",
    *(f"capa_export/graphs/{name}.toml" for name in ("qwen25vl", "llava15", "internvl3", "internvl35", "qwen3vl")),
    "capa_export/graphs/gates.toml",
    *(f"capa_export/graphs/tiny-{name}.toml" for name in ("qwen25vl", "llava15", "internvl3")),
    *(f"capa_export/graphs/checkpoints/tiny-{name}/model.safetensors" for name in ("llava15", "internvl3")),
    *(f"capa_export/engines/{name}.toml" for name in ("onnx", "rtx", "spark", "orin", "thor", "h100", "ada", "ampere")),
    *(f"capa_export/engines/plugins/{name}" for name in ("build.sh", "capa_plugin.cpp", "capa_plugin.h")),
    *(TINY + name for name in ("config.json", "model.safetensors", "scene.png", "tokenizer.json")),
}
"""Named one by one, so that a file which vanishes from the checkout is missed too."""


def build(kind: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", str(folder), str(CHECKOUT)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", tmp_path_factory.mktemp("wheel"))


@dataclass(frozen=True)
class Installed:
    """A clean environment that holds the wheel and borrows everything else."""

    site: Path
    script: Path
    python: Path

    def run(self, *command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run in an empty folder, as somebody who has no checkout."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV"))}
        where = self.site / "empty"
        where.mkdir(exist_ok=True)
        return subprocess.run(
            [*command], cwd=where, env=inherited | environment, check=True, capture_output=True, text=True
        )


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "venv", with_pip=False)
    scripts = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(pip, check=True, capture_output=True, text=True)
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([python, "-c", where], check=True, capture_output=True, text=True).stdout.strip())
    # The .pth files in that folder, an editable install of the checkout among them, are not read from here.
    ours = sorted({str(Path(module.__file__ or "").parents[1]) for module in (pytest, sys.modules["numpy"])})
    (site / "borrowed.pth").write_text("\n".join(ours) + "\n", encoding="utf-8")
    return Installed(site=site, script=scripts / "capa-export", python=python)


def shipped_files() -> set[str]:
    code = {
        path.relative_to(CHECKOUT).as_posix()
        for path in (CHECKOUT / "capa_export").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    data = {
        "capa_export/" + path.relative_to(CHECKOUT).as_posix()
        for folder in DATA
        for path in (CHECKOUT / folder).rglob("*")
        if path.is_file()
    }
    return code | data


def test_the_wheel_holds_the_package_and_its_data_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == shipped_files()
    assert names >= EXPECTED


def test_no_python_in_the_data_folders() -> None:
    assert not [path for folder in DATA for path in (CHECKOUT / folder).rglob("*.py")]


def test_the_wheel_adds_one_top_level_name(installed: Installed) -> None:
    for name in ("graphs", "engines", "cli", "tests"):
        assert not list(installed.site.glob(f"{name}*"))
    assert (installed.site / "capa_export").is_dir()


def test_the_sdist_holds_what_a_build_and_the_tests_need(tmp_path: Path) -> None:
    with tarfile.open(build("sdist", tmp_path)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = {"cli.py", "pyproject.toml", "LICENSE", "graphs/tiny-qwen25vl.toml", "engines/rtx.toml"}
    assert names >= expected | {"tests/test_package.py", "capa_export/cli/__init__.py"}
    assert not [name for name in names if name.startswith(("out/", ".venv/", "dist/"))]


def test_what_runs_is_the_installed_package(installed: Installed) -> None:
    where = installed.run(installed.python, "-c", "import capa_export; print(capa_export.__file__)").stdout.strip()
    assert Path(where) == installed.site / "capa_export" / "__init__.py"


def test_version(installed: Installed) -> None:
    assert installed.run(installed.script, "--version").stdout == capa_export.__version__ + "\n"


@pytest.mark.parametrize(("command", "folder"), [("models", "graphs"), ("targets", "engines")])
def test_the_lists_come_from_the_installed_data(installed: Installed, command: str, folder: str) -> None:
    listed = installed.run(installed.script, command).stdout
    assert [line.split()[0] for line in listed.splitlines()] == sorted(
        path.stem for path in (CHECKOUT / folder).glob("*.toml") if path.name != "gates.toml"
    )


def test_help_names_every_command(installed: Installed) -> None:
    shown = installed.run(installed.script, "--help").stdout
    for command in (
        "build",
        "calibrate",
        "export",
        "engine",
        "validate",
        "run",
        "inspect",
        "plan",
        "models",
        "targets",
    ):
        assert f"\n  {command} " in shown


def test_help_imports_nothing_heavy(installed: Installed) -> None:
    log = installed.run(installed.script, "--help", PYTHONPROFILEIMPORTTIME="1").stderr
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in log.splitlines()}
    assert "typer" in imported
    assert not imported & {"torch", "onnx", "onnx_ir", "onnxruntime", "transformers", "numpy", "tensorrt_rtx"}


def test_help_answers_at_once(installed: Installed) -> None:
    def spent() -> float:
        times = os.times()
        return times.children_user + times.children_system

    installed.run(installed.script, "--help")  # Compiles.
    before = spent()
    installed.run(installed.script, "--help")
    assert spent() - before < 0.5


def test_the_launcher_of_a_checkout_is_the_same_command(tmp_path: Path) -> None:
    launcher = shutil.copy(CHECKOUT / "cli.py", tmp_path)
    shown = subprocess.run(
        [sys.executable, launcher, "--version"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(CHECKOUT)},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert shown == capa_export.__version__ + "\n"
