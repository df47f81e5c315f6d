"""Replaces files of a bundle together with its manifest: wherever that is cut short, it is the old or the new bundle.

New files, the new manifest and a list of changes lie in `.partial` until all of it is on the disk. Then the folder is
renamed to `.commit`: from then on the new bundle counts. `finish` does what is left, as often as it is cut short: it
removes what goes, moves what comes into its place, and the manifest last. A `.commit` without one is done with.
"""

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict

from capa_export.base.errors import CapaError
from capa_export.base.files import PARTIAL, remove, sync, sync_tree
from capa_export.bundle.confined import confined
from capa_export.bundle.lock import LOCK_FILES
from capa_export.bundle.manifest import MANIFEST, Name, encode_manifest, parse_manifest

__all__ = ["COMMIT", "SCRATCH", "commit", "finish", "is_committed", "leftovers", "sweep"]

SCRATCH, COMMIT = PARTIAL, ".commit"
_CHANGES = "changes.json"


def _visible(name: str) -> str:
    if name.startswith("."):
        raise ValueError("is hidden")
    return name


class _Changes(BaseModel):
    """What a replacement changes in a bundle."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    outputs: list[Annotated[Name, AfterValidator(_visible)]]
    """Files and folders that come, each in the place of what has its name."""
    removed: list[Name]
    """Files and folders that go."""


def is_committed(folder: Path) -> bool:
    """Whether a bundle holds a replacement that counts and is not in its place yet."""
    return (folder / COMMIT / MANIFEST).is_file()


def commit(folder: Path, manifest: Mapping[str, Any], outputs: Iterable[str], removed: Iterable[str]) -> None:
    """Replace files of a bundle that this process has locked.

    Args:
        folder: the bundle.
        manifest: the entries of the new one.
        outputs: files and folders in the scratch folder, which is used up.
        removed: files and folders that go.

    Raises:
        CapaError: a name leads out of the bundle; nothing has changed.
        OSError: the disk is full or failed, or an output is missing.
        ValueError: the manifest is none; nothing has changed.
    """
    scratch = folder / SCRATCH
    changes = _Changes(outputs=list(outputs), removed=list(removed))
    for name in (*changes.outputs, *changes.removed):
        confined(folder, name)
    for name in changes.outputs:
        (scratch / name).lstat()
    data = encode_manifest(dict(manifest))
    # One that could not be read again would leave no bundle at all.
    parse_manifest(data)
    (scratch / _CHANGES).write_text(changes.model_dump_json(), encoding="utf-8")
    (scratch / MANIFEST).write_bytes(data)
    sync_tree(scratch)
    scratch.rename(folder / COMMIT)
    sync(folder)
    finish(folder)


def finish(folder: Path) -> None:
    """Put a committed replacement of a bundle that this process has locked in its place.

    Raises:
        CapaError: the replacement is damaged, or leads out of the bundle.
        OSError: the disk failed.
    """
    committed = folder / COMMIT
    if is_committed(folder):
        changes = _read_changes(folder)
        _remove_files(folder, changes.removed)
        for name in changes.outputs:
            # The last time may have come this far.
            if os.path.lexists(committed / name):
                _move(committed / name, confined(folder, name))
        _sync_parents(folder, [*changes.outputs, *changes.removed])
        os.replace(committed / MANIFEST, folder / MANIFEST)
        sync(folder)
        remove(committed)


def leftovers(folder: Path) -> list[Path]:
    """What commands that were killed left in a bundle, or the one at work needs."""
    return [*folder.glob(f".*{PARTIAL}"), *folder.glob(COMMIT)]


def sweep(folder: Path) -> None:
    """Remove what commands that were killed left in a bundle that this process has just locked."""
    finish(folder)
    for path in leftovers(folder):
        if path.name not in LOCK_FILES:
            remove(path)


def _read_changes(folder: Path) -> _Changes:
    """What a committed replacement changes, once its manifest is known to be one."""
    try:
        parse_manifest(confined(folder, f"{COMMIT}/{MANIFEST}").read_bytes())
        return _Changes.model_validate_json(confined(folder, f"{COMMIT}/{_CHANGES}").read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CapaError(
            f"{folder / COMMIT}: damaged replacement of a stage; delete the folder {folder} and build it again"
        ) from error


def _remove_files(folder: Path, names: Iterable[str]) -> None:
    """Remove files of a bundle, and the folders that nothing is left in."""
    for name in names:
        path = confined(folder, name)
        remove(path)
        for parent in PurePosixPath(name).parents[:-1]:
            with suppress(OSError):
                # Only succeeds where nothing is left.
                (folder / parent).rmdir()


def _move(source: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir() or place.is_dir():
        remove(place)
    os.replace(source, place)


def _sync_parents(folder: Path, names: Iterable[str]) -> None:
    """Put on the disk which files there are, before a manifest that lists them."""
    parents = {folder / parent for name in names for parent in PurePosixPath(name).parents}
    for parent in sorted(parents, reverse=True):
        if parent.is_dir():
            sync(parent)
