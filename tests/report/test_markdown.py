"""The pull-request comment: short, and nothing in it is acted upon."""

import re

from capa_export.report.markdown import markdown
from capa_export.report.schema import MethodError
from tests.report.results import BISECTION, EVIL, MANIFEST, answers, compared, parity_of, selected

PLAIN = {**MANIFEST, "recipe": {"name": "tiny"}}


def cells(text: str, start: str) -> list[str]:
    """Of the row of a table that starts so."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_verdict_first_then_a_row_per_comparison() -> None:
    text = markdown(parity_of(), PLAIN)
    assert text.startswith("## Passed: tiny, fp16\n")
    assert cells(text, "fp16 ONNX against")[1:] == ["2.5e-03", "1.0e-04", "", "", "0 of 16", "3 of 4"]
    assert cells(text, "fp16 ONNX, layer 1")[1:] == ["0.9900", "0.9500", "2 of 4", "0.50%"]
    assert cells(text, "CAPA")[1:] == ["90.0% (85.0 to 94.0)", "92.0% (87.0 to 96.0)", "0.0500"]
    assert "+0.2000 (+0.1500 to +0.2500), 95% interval" in text


def test_what_failed_is_said_and_marked() -> None:
    text = markdown(parity_of(compared(failure="cosine 0.5 below 0.999", value=0.5), bisection=BISECTION), PLAIN)
    assert text.startswith("## FAILED: tiny")
    assert "- **failed:** cosine 0.5 below 0.999" in text
    assert cells(text, "fp16 ONNX against")[2] == "**0.5**"
    assert "leaves the oracle in layers.1" in text


def test_it_stays_short_whatever_is_in_it() -> None:
    long = "word " * 4_000
    rows = [compared(f"{long}{index}", failure=long) for index in range(50)]
    selection = tuple(selected(long, layers=(1, 2, 3)) for _ in range(50))
    text = markdown(parity_of(*rows, warnings=(f"odd: {long}",) * 50, bisection=BISECTION, selection=selection), PLAIN)
    assert len(text.splitlines()) <= 45
    assert len(text) < 65_536
    assert "- **failed:** 45 more" in text
    assert "- **warning:** 47 more" in text
    assert "| 44 more |" in text
    assert "| 144 more |" in text


def test_nothing_in_it_is_acted_upon() -> None:
    nasty = f"{EVIL}\n\n# heading [link](x) ~~~"
    text = markdown(parity_of(compared(nasty, failure=nasty), warnings=(nasty,)), MANIFEST)
    assert "<script" not in text
    assert "@z" not in text
    assert len(re.findall(r"^#", text, flags=re.MULTILINE)) == 1
    assert len(cells(text, "&lt;script")) == len(cells(text, "export error")) == 7
    for mark in ("`y`", "[link]", "~~~"):
        assert mark not in text


def test_without_questions_and_selection() -> None:
    text = markdown(parity_of(method_error=MethodError(questions=0), selection=()), PLAIN)
    assert "method error" not in text
    assert "selection" not in text


def test_the_method_has_a_verdict_of_its_own() -> None:
    assert markdown(parity_of(answers=answers()), PLAIN).startswith("## Passed: tiny, fp16\n\nanswers: 91 % as dense\n")
    text = markdown(parity_of(answers=answers(100)), PLAIN)
    assert text.startswith("## Not fit to ship: tiny, fp16\n\nanswers: 50 % as dense: not fit to ship, 90 %")
    failed = parity_of(compared(failure="cosine 0.5 below 0.999"), answers=answers(100))
    assert markdown(failed, PLAIN).startswith("## FAILED: tiny")
