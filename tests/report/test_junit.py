"""The JUnit file: one case a check, red exactly where the report is."""

from pathlib import Path
from xml.etree import ElementTree as ET

from capa_export.report.junit import write_junit
from capa_export.report.schema import MethodError, ParityReport
from tests.report.results import EVIL, answers, compared, method_error, parity_of, selected


def written(folder: Path, parity: ParityReport, name: str = "demo") -> ET.Element:
    path = folder / "junit.xml"
    write_junit(path, parity, name)
    return ET.parse(path).getroot()  # noqa: S314 - written just above.


def failed(root: ET.Element) -> list[str]:
    return [case.get("name", "") for case in root.iter("testcase") if case.find("failure") is not None]


def test_a_suite_per_question_and_a_case_per_check(tmp_path: Path) -> None:
    root = written(tmp_path, parity_of(warnings=("One picture only.",)))
    assert [suite.get("name") for suite in root] == [
        "export error: fp32 ONNX, nothing removed against eager CAPA fp32",
        "export error: fp32 ONNX against eager CAPA fp32",
        "export error: fp16 ONNX against eager CAPA fp32",
        "selection: fp16 ONNX against eager CAPA fp32",
        "method error",
        "verdict",
    ]
    cases = root[0].findall("testcase")
    assert [case.get("name") for case in cases] == [check.name for check in compared().checks]
    assert failed(root) == []
    said = root[-1].findtext("system-out")
    assert said is not None
    assert said.startswith("One picture only.\n")


def test_counts_add_up_and_cases_have_names_of_their_own(tmp_path: Path) -> None:
    parity = parity_of(compared(failure="cosine too small"), selection=(selected(layers=(1, 4), failure="too far"),))
    root = written(tmp_path, parity)
    for element in (root, *root):
        assert int(element.get("tests", "")) == len(list(element.iter("testcase"))) > 0
        assert int(element.get("failures", "")) == len(list(element.iter("failure")))
    names = [(case.get("classname"), case.get("name")) for case in root.iter("testcase")]
    assert len(set(names)) == len(names)
    assert failed(root) == ["cosine", "furthest flip, layer 4", "parity"]


def test_a_failure_holds_its_sentence(tmp_path: Path) -> None:
    failure = next(written(tmp_path, parity_of(compared(failure="cosine 0.2 below 0.999"))).iter("failure"))
    assert failure.get("message") == failure.text == "cosine 0.2 below 0.999"


def test_it_is_red_even_where_no_check_says_why(tmp_path: Path) -> None:
    parity = parity_of(passed=False, failures=("no artefact could be loaded",))
    assert failed(written(tmp_path, parity)) == ["parity"]


def test_warnings_fail_only_a_strict_run(tmp_path: Path) -> None:
    behind = parity_of(warnings=("CAPA is behind.",), method_error=method_error(beats_random=False))
    assert failed(written(tmp_path, behind)) == []
    strict = behind.model_copy(update={"strict": True, "passed": False})
    root = written(tmp_path, strict)
    assert failed(root) == ["CAPA is closer to dense than random pruning", "parity"]
    assert "CAPA is behind." in [failure.text for failure in root.iter("failure")]


def test_what_was_not_asked_is_skipped(tmp_path: Path) -> None:
    root = written(tmp_path, parity_of(method_error=MethodError(questions=0)))
    assert len(list(root.iter("skipped"))) == 2
    assert failed(root) == []


def test_text_that_xml_cannot_hold(tmp_path: Path) -> None:
    failure = f"{EVIL} \x00\x1b[31m \ud800 \uffff ]]> end"
    found = next(written(tmp_path, parity_of(compared(failure=failure)), EVIL + "\x07").iter("failure"))
    assert found.text == f"{EVIL} \ufffd\ufffd[31m \ufffd \ufffd ]]> end"


def test_equal_results_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_junit(tmp_path / name, parity_of(), "demo")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_answers_that_changed_are_red_unless_accepted(tmp_path: Path) -> None:
    assert failed(written(tmp_path, parity_of(answers=answers()))) == []
    ruined = answers(100)
    root = written(tmp_path, parity_of(answers=ruined))
    assert failed(root) == ["answers as dense"]
    (failure,) = root.iter("failure")
    assert failure.text == "50 % as dense: not fit to ship, 90 % are asked for"
    accepted = ruined.model_copy(update={"accepted": True})
    assert failed(written(tmp_path, parity_of(answers=accepted))) == []
