"""Writes the parity report as JUnit XML: a suite per question, a case per check."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

from capa_export.report.schema import Check, ParityReport, Selection
from capa_export.report.words import by_stage, open_warnings

__all__ = ["write_junit"]

# What XML 1.0 cannot hold, not even escaped.
_FORBIDDEN = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class _Case:
    name: str
    failure: str = ""
    skipped: str = ""


def write_junit(path: Path, parity: ParityReport, bundle_name: str) -> None:
    """Write a report that CI systems read; it is red exactly where the parity report is.

    Args:
        path: the XML file to write.
        parity: the parity report.
        bundle_name: the name that begins every class name.
    """
    suites = [
        (f"export error: {row.artefact} against {row.reference}", _checks(row.checks)) for row in parity.export_error
    ]
    suites += [(f"selection: {row.artefact} against {row.reference}", _stages(row)) for row in parity.selection]
    suites += [("method error", [_answers(parity), _method(parity)]), ("verdict", [_verdict(parity)])]
    cases = [case for _, found in suites for case in found]
    root = ET.Element("testsuites", {"name": _text(bundle_name), **_counts(cases)})
    for name, found in suites:
        suite = ET.SubElement(root, "testsuite", {"name": _text(name), **_counts(found)})
        suite.set("skipped", str(sum(bool(case.skipped) for case in found)))
        for case in found:
            element = ET.SubElement(
                suite, "testcase", {"name": _text(case.name), "classname": _text(f"{bundle_name}.{name}"), "time": "0"}
            )
            if case.failure:
                ET.SubElement(element, "failure", message=_text(case.failure), type="parity").text = _text(case.failure)
            elif case.skipped:
                ET.SubElement(element, "skipped", message=_text(case.skipped))
        said = {"method error": parity.method_error.words, "verdict": (*parity.warnings, *parity.notes)}.get(name)
        if said:
            ET.SubElement(suite, "system-out").text = _text("\n".join(said))
    ET.indent(root)
    path.write_bytes(ET.tostring(root, encoding="utf-8", xml_declaration=True) + b"\n")


def _checks(checks: Iterable[Check]) -> list[_Case]:
    return [_Case(check.name, check.failure) for check in checks]


def _stages(row: Selection) -> list[_Case]:
    return [
        _Case(f"{check.name}, layer {stage.layer}", check.failure)
        for stage, checks in by_stage(row)
        for check in checks
    ]


def _answers(parity: ParityReport) -> _Case:
    """The case of the answers, which fails where the method's loss is beyond its bound and not accepted."""
    name, found = "answers as dense", parity.answers
    if found is None:
        return _Case(name, skipped="no question was asked of the eager model")
    return _Case(name, failure="" if found.passed or found.accepted else found.words)


def _method(parity: ParityReport) -> _Case:
    """The case of CAPA against random pruning, which fails only where the user is strict."""
    name, method = "CAPA is closer to dense than random pruning", parity.method_error
    if method.beats_random is None:
        return _Case(name, skipped="too little was asked, or nothing removed, to tell")
    behind = not method.beats_random and parity.strict
    return _Case(name, failure=" ".join(method.words) or "it is not" if behind else "")


def _verdict(parity: ParityReport) -> _Case:
    """The case that fails where the parity report does, whether or not another case says why."""
    sentences = (*parity.failures, *(open_warnings(parity) if parity.strict else ()))
    return _Case("parity", failure="" if parity.passed else "\n".join(sentences) or "parity failed")


def _counts(cases: Iterable[_Case]) -> dict[str, str]:
    cases = list(cases)
    failed = sum(bool(case.failure) for case in cases)
    return {"tests": str(len(cases)), "failures": str(failed), "errors": "0", "time": "0"}


def _text(text: str) -> str:
    return _FORBIDDEN.sub("\ufffd", text)
