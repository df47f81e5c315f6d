"""Parity as a table on the terminal."""

import pytest

from capa_export.report.schema import MethodError
from capa_export.report.terminal import print_parity
from tests.report.results import BISECTION, answers, compared, method_error, parity_of, selected


def words(line: str) -> list[str]:
    """The cells of a row, which stand at least two spaces apart."""
    return [cell for cell in line.split("  ") if cell]


def test_verdict_then_a_row_per_artefact(capsys: pytest.CaptureFixture[str]) -> None:
    print_parity(parity_of())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "parity: passed"
    (row,) = (line for line in lines if line.startswith("fp16 ONNX  ") and "0/16" in line)
    assert [cell.strip() for cell in words(row)] == ["fp16 ONNX", "2.5e-03", "1.0e-04", "0/16", "3/4"]
    assert [cell.strip() for cell in words(lines[lines.index(row) + 4])] == [
        "fp16 ONNX", "1", "0.9900", "0.9500", "2/4", "0.50%",
    ]  # fmt: skip
    (row,) = (line for line in lines if line.startswith("CAPA  "))
    assert [cell.strip() for cell in words(row)] == [
        "CAPA", "90.0% (85-94)", "92.0% (87-96)", "91.0% (86-95)", "0.0500",
    ]  # fmt: skip
    assert lines[-2:] == ["CAPA beats random pruning.", "No engine was run & none < was asked for."]


def test_what_failed_and_where(capsys: pytest.CaptureFixture[str]) -> None:
    row = compared("[bold]an artefact", failure="cosine [red] 0.2 below 0.999")
    print_parity(parity_of(row, warnings=("few pictures",), bisection=BISECTION))
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [
        "parity: FAILED",
        "  cosine [red] 0.2 below 0.999",
        "  warning: few pictures",
        f"  {BISECTION.sentence}",
    ]
    assert any(line.startswith("[bold]an artefact") for line in lines)


def test_without_selection_questions_and_answers(capsys: pytest.CaptureFixture[str]) -> None:
    print_parity(parity_of(selection=(), method_error=MethodError(questions=0)))
    shown = capsys.readouterr().out
    assert "Selection" not in shown
    assert "Method error" not in shown
    print_parity(parity_of(selection=(selected(layers=(1, 4)),), method_error=method_error(known=False)))
    assert "random, same k" in capsys.readouterr().out


def test_what_the_method_costs_stands_under_what_the_export_costs(capsys: pytest.CaptureFixture[str]) -> None:
    print_parity(parity_of(answers=answers()))
    assert capsys.readouterr().out.splitlines()[:2] == ["parity: passed", "answers: 91 % as dense"]
    ruined = answers(0, questions=3)
    print_parity(parity_of(answers=ruined))
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["parity: passed", "answers: 0 of 3 as dense: not fit to ship, 90 % are asked for"]
    print_parity(parity_of(answers=ruined.model_copy(update={"accepted": True})))
    assert "answers: 0 of 3 as dense: accepted, 90 % are asked for" in capsys.readouterr().out
