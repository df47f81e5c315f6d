"""Bundles whose files lie there already: tests that are not about writing them have the manifest say so."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from capa_export.bundle.manifest import MANIFEST, encode_manifest
from capa_export.bundle.store import Bundle, file_digest

__all__ = ["record"]


def record(
    folder: Path,
    name: str,
    files: Sequence[str],
    *,
    key: str = "key",
    entries: Mapping[str, Any] = MappingProxyType({}),
    **about: Any,
) -> Bundle:
    """Have a manifest say that a stage wrote these files of a folder.

    Args:
        folder: the bundle's.
        name: of the stage.
        files: relative to the folder.
        key: of the stage's inputs.
        entries: of the manifest, at its top.
        about: what the stage's record holds besides.
    """
    bundle = Bundle(folder)
    manifest = bundle.manifest
    digests = {file: file_digest(folder / file) for file in files}
    manifest["stages"][name] = {"key": key, **about, "files": digests, "linked": {}}
    (folder / MANIFEST).write_bytes(encode_manifest({**manifest, **entries}))
    return bundle
