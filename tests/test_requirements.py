"""What `make` installs is held to hashes: every package but torch, at the versions of constraints.txt."""

import re
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LOCKS: dict[str, set[str]] = {"demo": set(), "dev": {"rtx", "dev"}}
"""By file, the extras that it is for."""


def pins(text: str) -> dict[str, set[str]]:
    """Versions of each package that hold for this interpreter."""
    found: dict[str, set[str]] = {}
    for line in text.splitlines():
        if line and line[0].isalnum():
            requirement = Requirement(line.partition(" \\")[0])
            if requirement.marker is None or requirement.marker.evaluate():
                found.setdefault(canonicalize_name(requirement.name), set()).add(str(requirement.specifier))
    return found


@pytest.fixture(params=LOCKS)
def lock(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def text(lock: str) -> str:
    return (ROOT / "requirements" / f"{lock}.txt").read_text(encoding="utf-8")


def test_every_package_has_a_hash(text: str) -> None:
    entries = re.sub(r"\s*\\\n\s*", " ", text).splitlines()
    packages = [entry for entry in entries if entry and not entry.startswith("#")]
    assert len(packages) > 60
    for entry in packages:
        assert re.fullmatch(r"[\w.-]+==\S+ ; .*?( --hash=sha256:[0-9a-f]{64})+", entry), entry


def test_the_demo_installs_nothing_for_engines() -> None:
    text = (ROOT / "requirements" / "demo.txt").read_text(encoding="utf-8")
    assert {name for name in pins(text) if name.startswith(("tensorrt", "triton", "cuda", "nvidia"))} == set()


@pytest.mark.skipif(sys.version_info[:2] not in {(3, minor) for minor in range(10, 14)}, reason="not locked for")
def test_what_is_asked_for_is_locked_at_the_versions_of_the_constraints(lock: str, text: str) -> None:
    locked = pins(text)
    assert all(len(versions) == 1 for versions in locked.values())
    constrained = pins((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    assert {name: constrained.get(name) for name in locked} == locked
    asked = [Requirement(line) for line in requires("capa-export") or []]
    extras = [{"extra": extra} for extra in ("", *LOCKS[lock])]
    wanted = {
        canonicalize_name(one.name)
        for one in asked
        if one.marker is None or any(one.marker.evaluate(extra) for extra in extras)
    }
    assert wanted - locked.keys() == {"torch"}


@pytest.mark.skipif(sys.version_info < (3, 11), reason="what 3.10 alone needs is not listed")
def test_the_licence_of_each_package_of_the_demo_is_listed() -> None:
    text = (ROOT / "docs" / "licences.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\S+) +\| \S+ +\| (.+?) +\|$", text, re.MULTILINE)
    licences = {canonicalize_name(name): licence for name, licence in rows}
    locked = pins((ROOT / "requirements" / "demo.txt").read_text(encoding="utf-8"))
    assert locked.keys() - licences.keys() == set()
    assert "UNKNOWN" not in licences.values()
