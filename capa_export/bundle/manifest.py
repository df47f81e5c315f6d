"""`capa_manifest.json`: its text, which carries a digest of itself, and what may stand in it."""

import hashlib
import json
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from capa_export.base.precision import Precision
from capa_export.base.toml import first_problem
from capa_export.bundle.confined import is_name

__all__ = ["VERSION", "digest_of", "parsed", "written"]

VERSION = 2


def digest_of(value: object) -> str:
    """SHA-256 of a JSON-able value: equal values, equal digests."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _named(name: str) -> str:
    if not is_name(name):
        raise ValueError("is no name of a file in the bundle")
    return name


Name = Annotated[str, AfterValidator(_named)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Entry(BaseModel):
    """Stages note what they like beside what others read."""

    model_config = ConfigDict(extra="allow", strict=True, use_attribute_docstrings=True)


class _Link(_Entry):
    bytes: int
    mtime_ns: int
    header_sha256: str
    sha256: Sha256 | None


class _Engine(_Entry):
    onnx: Name | None = None
    runtime: str = ""


class _Plugins(_Entry):
    kind: str


class _Result(_Entry):
    precision: Precision = "fp16"
    linear_layers: list[int] = []
    alpha: str = ""
    weights: str = ""
    runtime: str = ""
    compute_capabilities: list[str] = []
    plugins: _Plugins | None = None
    engines: dict[Name, _Engine] = {}


class _Stage(_Entry):
    key: str
    """Digest of what it was made from."""
    files: dict[Name, Sha256]
    linked: dict[Name, _Link] = {}
    result: _Result = _Result()


class _Checkpoint(_Entry):
    source: str
    revision: str | None
    files: dict[str, Any]
    sha256: dict[str, str]


class _Hashed(_Entry):
    source: str = ""
    revision: str | None = None
    files: dict[str, Any]
    sha256: dict[str, str]


class _Manifest(_Entry):
    version: int
    stages: dict[Name, _Stage]
    recipe: dict[str, Any] = {}
    """Read by `recipe_of`."""
    command: list[str] = []
    tool: dict[str, str] = {}
    checkpoint: _Checkpoint | None = None
    hashed: _Hashed | None = None


def written(entries: dict[str, Any]) -> bytes:
    """The file of these entries."""
    # What JSON makes of them is what will be read.
    plain = json.loads(json.dumps(entries))
    return (json.dumps({**plain, "digest": digest_of(plain)}, indent=2) + "\n").encode()


def parsed(data: bytes) -> dict[str, Any]:
    """The entries of a file, which is byte for byte what `written` makes of them.

    Raises:
        ValueError: it is not, or something in it is not what it should be.
    """
    entries: Any = json.loads(data)
    if not isinstance(entries, dict):
        raise ValueError("is no JSON object")  # noqa: TRY004 - What is wrong is a value in a file.
    if "version" in entries and entries["version"] != VERSION:
        raise ValueError(f"version {entries['version']}, this capa-export reads {VERSION}")
    entries.pop("digest", None)
    if written(entries) != data:
        raise ValueError("its digest differs from what it holds")
    try:
        _Manifest.model_validate(entries)
    except ValidationError as error:
        raise ValueError(first_problem(error, _Manifest)) from error
    return entries
