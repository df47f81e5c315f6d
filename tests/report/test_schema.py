"""What `parity.json` holds, and that its JSON Schema is the one in `docs`."""

import json
from pathlib import Path
from typing import Any

import pytest

from capa_export.base.errors import CapaError
from capa_export.report.schema import Check, ParityReport, read_parity, write_parity
from tests.report.results import BISECTION, answers, compared, parity_of

ROOT = Path(__file__).resolve().parents[2]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    parity = parity_of(compared(failure="too far"), bisection=BISECTION)
    write_parity(tmp_path / "parity.json", parity)
    assert read_parity(tmp_path / "parity.json") == parity


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_figure_that_is_not_finite_is_null(tmp_path: Path, value: float) -> None:
    write_parity(path := tmp_path / "parity.json", parity_of(compared(value=value)))
    found = json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert found["export_error"][0]["checks"][1]["value"] is None
    assert Check(name="cosine", value=value).value is None


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"version": 1}, "version: Input should be 2"),
        ({"passed": "perhaps"}, "passed: Input should be a valid boolean"),
        ({"surplus": 1}, "unknown key surplus"),
    ],
)
def test_another_file_is_refused_in_one_line(tmp_path: Path, change: dict[str, Any], problem: str) -> None:
    path = tmp_path / "parity.json"
    path.write_text(json.dumps(parity_of().model_dump(mode="json") | change), encoding="utf-8")
    with pytest.raises(CapaError, match="validate the bundle again") as caught:
        read_parity(path)
    assert problem in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[", "null", "\x00", "[" * 100_000], ids=["empty", "cut", "null", "nul", "deep"])
def test_what_is_no_report_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "parity.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(CapaError, match="is no parity report of version 2"):
        read_parity(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CapaError, match="no such file; `capa-export validate` writes it"):
        read_parity(tmp_path / "parity.json")


def test_the_json_schema_is_current() -> None:
    """`python -m capa_export.report.schema > docs/parity.schema.json` writes it."""
    shipped = json.loads((ROOT / "docs" / "parity.schema.json").read_text(encoding="utf-8"))
    assert shipped == ParityReport.model_json_schema(mode="serialization")


def test_a_bundle_is_fit_where_it_is_right_and_keeps_the_answers() -> None:
    assert parity_of().fit
    assert parity_of(answers=answers()).fit
    assert parity_of(answers=answers(180)).fit
    assert not parity_of(answers=answers(179)).fit
    assert parity_of(answers=answers(0, accepted=True)).fit
    assert not parity_of(passed=False, answers=answers()).fit
