"""The Python interface: its names, its documents, and that it prints nothing."""

import inspect
import re
from pathlib import Path

import pytest

import capa_export
from capa_export.api import builds, stages

ROOT = Path(__file__).resolve().parents[2]
DOC = ROOT / "docs" / "api.md"


def test_names_are_stable() -> None:
    assert capa_export.__all__ == [
        "Bundle",
        "CapaError",
        "GenerationOptions",
        "ParityReport",
        "VisionLanguageModel",
        "build",
        "evaluate",
        "open",
        "tune",
    ]
    assert all(getattr(capa_export, name) for name in capa_export.__all__)
    bundle = {name for name in vars(capa_export.Bundle) if name[0] != "_"}
    assert bundle == {
        *("build_engines", "compare", "evaluate", "explain", "folder", "load", "manifest", "parity", "validate"),
    }
    asked = {name for name in vars(capa_export.VisionLanguageModel) if name[0] != "_"}
    assert asked >= {"answer", "answers", "chat", "stream"}
    assert (Path(capa_export.__file__).parent / "py.typed").is_file()


def test_stages_take_what_a_build_takes() -> None:
    whole = inspect.signature(builds.build).parameters
    for stage in (stages.calibrate, stages.export, builds.plan):
        own = inspect.signature(stage).parameters
        assert own.keys() - whole.keys() <= {"workers", "ray", "in_place", "polygraphy"}, stage
        for name in own.keys() & whole.keys() - {"out", "weights"}:
            assert own[name].default == whole[name].default, (stage, name)


def test_the_document_is_that_of_the_docstrings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import griffe2md

    monkeypatch.chdir(ROOT)
    for package in re.findall(r"griffe2md (\S+)", (ROOT / "Makefile").read_text(encoding="utf-8")):
        assert griffe2md.main([package]) == 0
    assert DOC.read_text(encoding="utf-8").split() == capsys.readouterr().out.split(), "run `make docs`"
