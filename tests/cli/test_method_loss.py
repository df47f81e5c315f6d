"""Exit code 7: the bundle is right, and its method changes the answers."""

from pathlib import Path

import pytest

from capa_export.base.errors import ExitCode
from capa_export.report.schema import read_parity
from tests.cli.conftest import Cli


@pytest.fixture(scope="module")
def strict(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe that asks random weights for what none can keep."""
    path = tmp_path_factory.mktemp("strict") / "strict.toml"
    path.write_text(recipe.read_text().replace("least_agreement = 0", "least_agreement = 1"), encoding="utf-8")
    return path


def test_a_method_that_changes_the_answers_is_not_fit_to_ship(
    cli: Cli, strict: Path, pictures: Path, spare: Path
) -> None:
    options = ("build", "-m", strict, "--images", pictures, "-t", "onnx", "-o", spare, "--schedule", "capa@0:0.99")
    code, out, err = cli(*options)
    assert code == ExitCode.METHOD
    assert out.splitlines()[0] == "parity: passed"
    assert out.splitlines()[1].startswith("answers: 0 of ") and "not fit to ship, 100 % are asked for" in out
    assert "--accept-method-loss" in err.splitlines()[-1] and "0 of " in err.splitlines()[-1]
    # Why no other schedule is named: three pictures cannot tell them apart.
    assert "too few to tell schedules apart" in err
    report = read_parity(spare / "parity.json")
    assert report.passed and not report.fit

    code, out, _ = cli(*options, "--accept-method-loss")
    assert code == 0 and "as dense: accepted" in out
    assert read_parity(spare / "parity.json").fit
    assert cli("validate", spare, "--images", pictures)[0] == ExitCode.METHOD
