"""`capa_manifest.json`: its text, which carries a digest of itself, and what may stand in it."""

import hashlib
import json
from functools import lru_cache
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from capa_export.base.precision import Precision
from capa_export.base.toml import first_problem
from capa_export.bundle.confined import is_name

__all__ = ["MANIFEST", "VERSION", "Name", "digest_of", "encode_manifest", "parse_manifest"]

MANIFEST = "capa_manifest.json"
VERSION = 2


def digest_of(value: object) -> str:
    """SHA-256 of a JSON-able value: equal values, equal digests."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _checked_name(name: str) -> str:
    if not is_name(name):
        raise ValueError("is no name of a file in the bundle")
    return name


Name = Annotated[str, AfterValidator(_checked_name)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Record(BaseModel):
    """An entry of the manifest; stages may add fields that nobody else reads."""

    model_config = ConfigDict(extra="allow", strict=True, use_attribute_docstrings=True)


class _LinkRecord(_Record):
    bytes: int
    mtime_ns: int
    header_sha256: str
    sha256: Sha256 | None


class _EngineRecord(_Record):
    onnx: Name | None = None
    runtime: str = ""


class _PluginsRecord(_Record):
    kind: str


class _ResultRecord(_Record):
    precision: Precision = "fp16"
    linear_layers: list[int] = []
    fp32_layers: list[str] = []
    not_for_genai: str | None = None
    needs_transformers: str | None = None
    pictures: dict[str, int] = {}
    latency: dict[str, Any] | None = None
    """None where nothing was timed."""
    alpha: str = ""
    weights: str = ""
    runtime: Literal["", "tensorrt-rtx", "tensorrt"] = ""
    """The module that is imported to run the engines."""
    compute_capabilities: list[str] = []
    plugins: _PluginsRecord | None = None
    engines: dict[Name, _EngineRecord] = {}


class _StageRecord(_Record):
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    key: str
    """Digest of the stage's inputs."""
    files: dict[Name, Sha256]
    linked: dict[Name, _LinkRecord] = {}
    result: _ResultRecord = _ResultRecord()


class _CheckpointRecord(_Record):
    source: str
    revision: str | None
    files: dict[str, Any]
    sha256: dict[str, str]
    quantization: str | None = None
    """What the weights are in the checkpoint; None for plain ones."""


class _HashesRecord(_Record):
    source: str = ""
    revision: str | None = None
    files: dict[str, Any]
    sha256: dict[str, str]


class _Manifest(_Record):
    version: int
    stages: dict[Name, _StageRecord]
    recipe: dict[str, Any] = {}
    """The recipe, as `recipe_of` reads it."""
    command: list[str] = []
    tool: dict[str, str] = {}
    checkpoint: _CheckpointRecord | None = None
    hashed: _HashesRecord | None = None


def encode_manifest(entries: dict[str, Any]) -> bytes:
    """The manifest's bytes, with the digest of its entries."""
    # What JSON makes of them is what will be read.
    plain = json.loads(json.dumps(entries))
    return (json.dumps({**plain, "digest": digest_of(plain)}, indent=2) + "\n").encode()


def parse_manifest(data: bytes) -> dict[str, Any]:
    """The entries of a manifest, whose bytes must be exactly those that `encode_manifest` writes.

    Raises:
        ValueError: it is not, or something in it is not what it should be.
    """
    _check(data)
    entries: dict[str, Any] = json.loads(data)
    del entries["digest"]
    return entries


# A stage reads it dozens of times, and what comes out may be changed.
@lru_cache(maxsize=8)
def _check(data: bytes) -> None:
    entries: Any = json.loads(data)
    if not isinstance(entries, dict):
        raise ValueError("is no JSON object")  # noqa: TRY004 - What is wrong is a value in a file.
    if "version" in entries and entries["version"] != VERSION:
        raise ValueError(f"version {entries['version']}, this capa-export reads {VERSION}")
    entries.pop("digest", None)
    if encode_manifest(entries) != data:
        raise ValueError("its digest differs from what it holds")
    try:
        _Manifest.model_validate(entries)
    except ValidationError as error:
        raise ValueError(first_problem(error, _Manifest)) from error
