"""Malformed files: whatever stands in them, a reader says in one line what is wrong, and neither crashes nor hangs."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from capa_export.base.errors import CapaError
from tests.fuzz.readers import READERS, Reader

SECONDS = 5
"""For one file: none takes half a second, even on a busy machine."""
NUMBERS = [0, -1, 1, 2**63, -(2**63), 10**30, 1e308, float("nan"), float("inf"), -0.5]
TEXTS = ["", "..", "../x", "/etc/passwd", "a\0b", "a\nb", "\x1b[2J", "\ud800", "x" * 5000, "C:\\x", "1" * 400]
LEAVES = st.one_of(
    st.none(), st.booleans(), st.sampled_from(NUMBERS), st.integers(), st.floats(), st.sampled_from(TEXTS), st.text()
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
TOML = [
    "[]",
    "{}",
    '""',
    "-1",
    "0",
    "1.5",
    "nan",
    "true",
    "1979-05-27",
    '"../x"',
    '"\\u0000"',
    "9" * 5000,
    "[" * 5000,
    "=",
]


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """To every value within a value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, entry in inner for found in paths_of(entry, (*path, key)))]


@st.composite
def changed_json(draw: st.DrawFn, good: bytes) -> bytes:
    """A good file in which some value is another, or is gone, or has another key."""
    data = {"": json.loads(good)}
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(paths_of(data)[1:] or [("",)]))
        parent: Any = data
        for key in path[:-1]:
            parent = parent[key]
        what = draw(st.sampled_from(["value", "value", "value", "gone", "key"]))
        if what == "gone" and path != ("",):
            del parent[path[-1]]
        elif what == "key" and isinstance(parent, dict) and path != ("",):
            parent[draw(st.sampled_from(TEXTS) | st.text())] = parent.pop(path[-1])
        else:
            parent[path[-1]] = draw(VALUES)
    return json.dumps(data.get("")).encode()


@st.composite
def changed_toml(draw: st.DrawFn, good: bytes) -> bytes:
    """A good file in which some line is another."""
    lines = good.decode().split("\n")
    index = draw(st.sampled_from([index for index, line in enumerate(lines) if "=" in line]))
    key = lines[index].partition("=")[0]
    what = draw(st.sampled_from(["value", "value", "value", "gone", "twice", "key"]))
    text = f"{draw(st.text(max_size=9))} = 1" if what == "key" else f"{key}= {draw(st.sampled_from(TOML))}"
    lines[index : index + 1] = {"gone": [], "twice": [lines[index]] * 2}.get(what, [text])
    return "\n".join(lines).encode(errors="surrogatepass")


@st.composite
def changed_bytes(draw: st.DrawFn, good: bytes) -> bytes:
    """A good file cut short, or with some bytes in the place of others."""
    data = good
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        stop = draw(st.integers(start, min(start + 9, len(data))) | st.just(len(data)))
        data = data[:start] + draw(st.binary(max_size=9)) + data[stop:]
    return data


NESTED = [bracket * 100_000 for bracket in (b"[", b'{"a":', b"\x0a\xff\x01")]
STRANGE = [
    b"",
    b"\0",
    b"null",
    b"[]",
    b"{}",
    b"0",
    b'"x"',
    b"\xff\xfe",
    b"\xef\xbb\xbf{}",
    b"1" * 5000,
    b"NaN",
    *NESTED,
]


def holds(reader: Reader, folder: Path, data: bytes) -> None:
    try:
        reader(folder, data)
    except CapaError as error:
        message = str(error)
        assert message and message.isprintable(), message
        assert len(message) < 9000


@pytest.mark.parametrize("name", READERS)
def test_malformed_files(name: str, tmp_path: Path) -> None:
    reader = READERS[name]
    structured = {"json": changed_json, "toml": changed_toml, "binary": changed_bytes}[reader.kind](reader.good)
    anything = changed_bytes(reader.good) | st.sampled_from(STRANGE) | st.binary()
    count = 20 if reader.is_slow else 80

    @settings(
        max_examples=count,
        deadline=SECONDS * 1000,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(st.integers(0, 3).flatmap(lambda kind: structured if kind else anything))
    def check(data: bytes) -> None:
        holds(reader, tmp_path, data)

    check()


@pytest.mark.parametrize("name", READERS)
def test_strange_files(name: str, tmp_path: Path) -> None:
    for data in STRANGE:
        holds(READERS[name], tmp_path, data)


@pytest.mark.parametrize("name", READERS)
def test_good_files(name: str, tmp_path: Path) -> None:
    """What the others change is taken as it is."""
    READERS[name](tmp_path, READERS[name].good)
