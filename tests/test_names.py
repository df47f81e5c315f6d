"""Every module has a test of its name, or is in the list of those that are tested through another."""

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "capa_export"


def modules(package: Path) -> set[str]:
    """Modules by their paths in the package; what is a package's own `__init__.py` tests of the package cover."""
    paths = (path.relative_to(package).with_suffix("") for path in package.rglob("*.py") if path.stem != "__init__")
    return {path.as_posix() for path in paths}


def faults(package: Path, tests: Path, elsewhere: Mapping[str, Sequence[str]]) -> list[str]:
    """A sentence for every module that has no test, or too many, and for every entry that leads nowhere."""
    known = modules(package)
    folder = {name: (tests / name).with_name(f"test_{Path(name).name.lstrip('_')}.py") for name in known}
    tested = {name for name, path in folder.items() if path.is_file()}
    listed = Counter(name for names in elsewhere.values() for name in names)
    return [
        *(f"{name}: has no test of its name, and is not listed" for name in sorted(known - tested - listed.keys())),
        *(f"{name}: is listed, and has a test of its name" for name in sorted(tested & listed.keys())),
        *(f"{name}: is listed, and there is no such module" for name in sorted(listed.keys() - known)),
        *(f"{name}: is listed twice" for name, count in sorted(listed.items()) if count > 1),
        *(f"{file}: there is no such test" for file in elsewhere if not (tests / file).is_file()),
    ]


def test_every_module_is_tested_under_its_name_or_listed() -> None:
    listed = tomllib.loads((TESTS / "tested_elsewhere.toml").read_text(encoding="utf-8"))
    assert len(modules(PACKAGE)) > 200
    assert faults(PACKAGE, TESTS, listed) == []


@pytest.mark.parametrize(
    ("listed", "found"),
    [
        ({"test_other.py": ["part/_two"]}, []),
        ({}, ["part/_two: has no test of its name, and is not listed"]),
        ({"test_other.py": ["part/_two", "one"]}, ["one: is listed, and has a test of its name"]),
        ({"test_other.py": ["part/_two", "three"]}, ["three: is listed, and there is no such module"]),
        ({"test_other.py": ["part/_two", "part/_two"]}, ["part/_two: is listed twice"]),
        ({"test_gone.py": ["part/_two"]}, ["test_gone.py: there is no such test"]),
    ],
)
def test_the_list_is_held(tmp_path: Path, listed: dict[str, list[str]], found: list[str]) -> None:
    for name in ("package/__init__.py", "package/one.py", "package/part/__init__.py", "package/part/_two.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for name in ("test_one.py", "test_other.py"):
        (tmp_path / "tests" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "tests" / name).touch()
    assert faults(tmp_path / "package", tmp_path / "tests", listed) == found
