"""Holds the files of a stage against its record: what was built, all of it, and nothing beside it."""

from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from posixpath import normpath
from typing import Any

from capa_export.base.errors import CapaError
from capa_export.base.files import fingerprint
from capa_export.bundle.confined import beside, confined, references
from capa_export.bundle.manifest import MANIFEST
from capa_export.bundle.stamps import Stamps

__all__ = ["files_of", "is_same", "recorded_files", "verify_files"]

_WEIGHTS = (".data", ".safetensors")
"""Endings of the names of large files."""


def files_of(record: Mapping[str, Any]) -> list[str]:
    """Names of the files that a stage wrote or linked to."""
    return [*record["files"], *record.get("linked", ())]


def recorded_files(stages: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """Names of the files that all stages wrote or linked to."""
    return {file for record in stages.values() for file in files_of(record)}


def verify_files(
    folder: Path, record: Mapping[str, Any], recorded: Collection[str], stamps: Stamps, *, weights: bool
) -> None:
    """Check that a stage's files are what was built, that they lead nowhere else, and are all there is.

    Args:
        folder: the bundle.
        record: of the stage.
        recorded: names of the files of all stages.
        stamps: of files that need not be read.
        weights: whether to read the files of weights, too.

    Raises:
        CapaError: a file is missing, was changed or added, or leads to one that is no file of the bundle.
    """
    known = {MANIFEST, *recorded}
    files = [file for file in files_of(record) if weights or not file.endswith(_WEIGHTS)]
    for file in set(files_of(record)).difference(files):
        if not confined(folder, file).is_file():
            raise CapaError(f"{folder / file}: missing; build again, or copy the bundle again")
    for file in files:
        if not is_same(folder, record, file, stamps, read_links=True):
            by_time = file not in record["files"] and record["linked"][file]["sha256"] is None
            how = "size, time or header differ" if by_time else "sha256 differs"
            raise CapaError(
                f"{folder / file}: missing or changed since it was built ({how} from {MANIFEST}); build "
                f"again, or copy the bundle again{', with its times (cp -a)' if by_time else ''}"
            )
    for file in files:
        for target in references(folder / file):
            if normpath(PurePosixPath(file).parent / target) not in known:
                raise CapaError(f"{folder / file}: reads {target}, which is no file of this bundle; build it again")
    for path in beside(folder, files):
        if path.relative_to(folder).as_posix() not in known:
            raise CapaError(f"{path}: was added since the bundle was built; remove it, since it might be read")


def is_same(folder: Path, record: Mapping[str, Any], file: str, stamps: Stamps, *, read_links: bool = False) -> bool:
    """Whether a file is there, and is what a stage wrote or linked to.

    Args:
        folder: the bundle.
        record: of the stage.
        file: its name.
        stamps: of files that need not be read.
        read_links: whether a link's size, time and header are not enough where its digest is known.
    """
    path = confined(folder, file)
    if not path.is_file():
        return False
    if file in record["files"]:
        return stamps.matches(path, record["files"][file])
    known = dict(record["linked"][file])
    digest = known.pop("sha256")
    if digest is not None and (read_links or fingerprint(path) != known):
        # A copy of the bundle may have other times.
        return stamps.matches(path, digest)
    return fingerprint(path) == known
