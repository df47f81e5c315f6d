"""A finished bundle of a small model, and a command line to ask about it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from capa_export.base.errors import ExitCode
from capa_export.base.toml import shipped
from capa_export.cli import main
from tests.conftest import noise

Result = tuple[int, str, str]
Cli = Callable[..., Result]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs a command line; gives its exit code, stdout and stderr."""

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope="session")
def recipe(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped recipe, made small, over the small checkpoint."""
    text = (shipped("graphs") / "qwen25vl.toml").read_text(encoding="utf-8")
    text = text.replace("Qwen/Qwen2.5-VL-7B-Instruct", str(checkpoint)).replace("layer = 3,", "layer = 2,")
    text = text.replace("prompts = 32", "prompts = 4").replace("steps = 16", "steps = 4\naccuracy_samples = 4")
    # Random weights are linear nowhere near 0.96, and answer otherwise when a token is gone.
    text = text.replace("least_agreement = 0.5", "least_agreement = 0")
    text = text.replace("eta = 0.96", "eta = 0.5\nbudget = 100").replace("alternatives = [11, 21]", "")
    path = tmp_path_factory.mktemp("recipe") / "small.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for index, size in enumerate(((224, 224), (140, 196), (84, 336))):
        noise(*size, index).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="session")
def bundle(recipe: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished bundle without engines. Tests copy it before they change it."""
    out = tmp_path_factory.mktemp("bundle") / "out"
    assert main(["build", "-m", str(recipe), "--images", str(pictures), "-t", "onnx", "-o", str(out)]) == ExitCode.OK
    return out


@pytest.fixture
def spare(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "spare"))


def preflight(cli: Cli, message: str, *arguments: object) -> None:
    code, out, err = cli(*arguments)
    assert code == ExitCode.PREFLIGHT, err
    assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 1
    assert message in err, err
    assert not out
