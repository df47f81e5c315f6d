"""The library name that the parser asks for."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from capa_export.kernels.plugins import alias
from capa_export.kernels.plugins.alias import ensure_parser_library


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "tensorrt_rtx_libs"
    folder.mkdir()
    (folder / "libtensorrt_rtx.so.1").write_text("library")
    monkeypatch.setattr(alias, "find_spec", lambda name: SimpleNamespace(origin=str(folder / "__init__.py")))
    return folder


def test_a_link_is_put_where_the_child_looks(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/lib")
    assert ensure_parser_library(tmp_path) == {"LD_LIBRARY_PATH": f"{tmp_path}{os.pathsep}/opt/lib"}
    assert (tmp_path / "libtensorrt_rtx.so").read_text() == "library"
    monkeypatch.delenv("LD_LIBRARY_PATH")
    (tmp_path / "libtensorrt_rtx.so").unlink()
    assert ensure_parser_library(tmp_path) == {"LD_LIBRARY_PATH": str(tmp_path)}


def test_nothing_is_done_where_nothing_is_missing(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (wheel / "libtensorrt_rtx.so").touch()
    assert ensure_parser_library(tmp_path) == {}
    monkeypatch.setattr(alias, "find_spec", lambda name: None)
    assert ensure_parser_library(tmp_path) == {}
    assert not (tmp_path / "libtensorrt_rtx.so").exists()
