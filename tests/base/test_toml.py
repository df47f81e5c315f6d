"""TOML files become settings, or one line that says what is wrong with them."""

from pathlib import Path

import pytest

from capa_export.base.errors import CapaError, ExitCode
from capa_export.base.toml import Settings, read_toml, shipped, shipped_names


class Limits(Settings):
    """A table."""

    most: int
    least: int = 0


class Recipe(Settings):
    """Tables in tables."""

    name: str
    limits: Limits = Limits(most=1)
    parts: tuple[Limits, ...] = ()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.toml"


def refusal(path: Path, text: str | bytes) -> str:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CapaError) as error:
        read_toml(path, Recipe, name="x")
    assert error.value.code == ExitCode.USAGE
    return str(error.value).removeprefix(f"{path}: ")


def test_what_is_read_and_what_is_filled_in(path: Path) -> None:
    path.write_text("[limits]\nmost = 3\n")
    assert read_toml(path, Recipe, name="x") == Recipe(name="x", limits=Limits(most=3))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("nam = 1", "unknown key nam; known keys: limits, parts"),
        ('name = "y"', "unknown key name; known keys: limits, parts"),
        ("[limits]\nmost = 1\nmor = 2", "unknown key limits.mor; known keys: least, most"),
        ("[limits]\nleast = 1", "limits.most: Field required"),
        ('[limits]\nmost = "many"', "limits.most: Input should be a valid integer, unable to parse string"),
        ("[[parts]]\nmost = 1\n[[parts]]\nmost = 1\nmor = 2", "unknown key parts.1.mor"),
        ("limits = ", "Invalid value"),
        (b"\xff", "'utf-8' codec can't decode byte 0xff"),
        ("parts = " + "[" * 5000, ""),
    ],
)
def test_the_first_problem_is_said(path: Path, text: str | bytes, problem: str) -> None:
    found = refusal(path, text)
    assert problem in found and found and "\n" not in found


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path, problem in ((tmp_path / "none.toml", "no such file"), (tmp_path, "Is a directory")):
        with pytest.raises(CapaError, match=problem) as error:
            read_toml(path, Recipe, name="x")
        assert error.value.code == ExitCode.USAGE


def test_shipped_files_are_there_and_gates_are_no_recipe() -> None:
    assert {"qwen25vl", "llava15"} <= set(shipped_names("graphs")) and "rtx" in shipped_names("engines")
    assert (shipped("graphs") / "gates.toml").is_file() and "gates" not in shipped_names("graphs")
