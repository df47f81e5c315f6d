"""The manifest's text carries a digest of itself, and nothing stands in it that a reader would trip over."""

import hashlib
import json
from typing import Any

import pytest

from capa_export.bundle.manifest import VERSION, digest_of, encode_manifest, parse_manifest

STAGE: dict[str, Any] = {"key": "k", "files": {"onnx/x.onnx": "0" * 64}}
LINK = {"bytes": 1, "mtime_ns": 2, "header_sha256": "0", "sha256": None}


def manifest(**entries: Any) -> dict[str, Any]:
    return {"version": VERSION, "stages": {"export": STAGE}, **entries}


def test_what_is_written_is_read() -> None:
    entries = manifest(command=["build", "é"], recipe={"ratio": 0.75}, calibration_samples=3)
    assert parse_manifest(encode_manifest(entries)) == entries
    # Tuples and paths are read as JSON has them.
    assert parse_manifest(encode_manifest(manifest(command=("a", "b"))))["command"] == ["a", "b"]


def test_digests_do_not_depend_on_order() -> None:
    assert digest_of({"a": 1, "b": [2]}) == digest_of({"b": [2], "a": 1}) != digest_of({"a": 1, "b": [3]})
    assert digest_of("x") == hashlib.sha256(b'"x"').hexdigest()


@pytest.mark.parametrize("change", [b" ", b"\n", b"//"])
def test_every_byte_counts(change: bytes) -> None:
    data = encode_manifest(manifest())
    for changed in (data + change, change + data):
        with pytest.raises(ValueError, match=r"digest differs|Expecting value|Extra data"):
            parse_manifest(changed)


def test_an_entry_without_its_digest_is_refused() -> None:
    entries = {**json.loads(encode_manifest(manifest())), "command": ["other"]}
    with pytest.raises(ValueError, match="its digest differs from what it holds"):
        parse_manifest((json.dumps(entries, indent=2) + "\n").encode())


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        ({"version": 1}, f"version 1, this capa-export reads {VERSION}"),
        ({"stages": {"export": {"key": "k"}}}, "stages.export.files: Field required"),
        ({"stages": {"../x": STAGE}}, "is no name of a file in the bundle"),
        ({"stages": {"export": {**STAGE, "files": {"/etc/passwd": "0" * 64}}}}, "is no name of a file in the bundle"),
        ({"stages": {"export": {**STAGE, "files": {"x": "short"}}}}, "should match pattern"),
        ({"stages": {"export": {**STAGE, "linked": {"x": {**LINK, "bytes": "1"}}}}}, "linked.x.bytes"),
        ({"stages": {"export": {**STAGE, "result": {"precision": "fp4"}}}}, "result.precision"),
        ({"command": "build"}, "command: Input should be a valid list"),
        ({"checkpoint": {"source": "x"}}, "checkpoint.revision: Field required"),
    ],
)
def test_wrong_entries_are_named(entries: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - The words are compared below.
        parse_manifest(encode_manifest(manifest(**entries)))
    assert problem in str(error.value)


def test_what_is_no_object_is_refused() -> None:
    with pytest.raises(ValueError, match="is no JSON object"):
        parse_manifest(b"[]")
