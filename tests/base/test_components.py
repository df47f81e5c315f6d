"""The bill of materials of a process is one that CycloneDX takes, and lists what is loaded."""

import json
from importlib.metadata import version

import pytest

from capa_export.base import components
from capa_export.base.components import bill_of_materials


def test_loaded_packages_are_listed() -> None:
    # Slow to import, and all workers would wait for it.
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    bill = bill_of_materials()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(bill)) is None
    found = {component["name"]: component for component in bill["components"]}
    assert found["pytest"] == {
        "type": "library",
        "name": "pytest",
        "version": version("pytest"),
        "purl": f"pkg:pypi/pytest@{version('pytest')}",
        "licenses": [{"expression": "MIT"}],
    }
    assert list(found) == [name for _, name in sorted((one["purl"], name) for name, one in found.items())]


def test_packages_that_are_not_loaded_are_not_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(components.sys, "modules", {"pytest": pytest, "json.decoder": json.decoder})
    assert [component["name"] for component in bill_of_materials()["components"]] == ["pytest"]


@pytest.mark.parametrize(
    ("lines", "licences"),
    [
        ("License-Expression: MIT\nLicense: x", [{"expression": "MIT"}]),
        ("Classifier: License :: OSI Approved :: MIT License", [{"license": {"name": "MIT License"}}]),
        ("License: BSD", [{"license": {"name": "BSD"}}]),
        ("License: Permission is hereby granted, free of charge,\n        to any person", []),
        ("License: " + "x" * 65, []),
        ("License:", []),
        ("Classifier: Topic :: Internet", []),
    ],
)
def test_licences(lines: str, licences: list[object]) -> None:
    from email import message_from_string

    assert components._licences(message_from_string(f"Name: a\n{lines}\n\nx")) == licences  # type: ignore[arg-type]
