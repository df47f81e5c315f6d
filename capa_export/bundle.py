"""The bundle folder: what is in it, what made it, and whether it still is what was built."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from capa_export.errors import CapaError, ExitCode
from capa_export.fingerprint import fingerprint

__all__ = ["MANIFEST", "Bundle", "digest_of", "file_digest"]

MANIFEST = "capa_manifest.json"
_VERSION = 1
_PARTIAL = ".partial"
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def digest_of(value: object) -> str:
    """SHA-256 of a JSON-able value: equal values, equal digests."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class Bundle:
    """A folder with a manifest; every stage's outputs are recorded with the key of what they were made from."""

    folder: Path

    @classmethod
    def open(cls, folder: Path) -> "Bundle":
        """A bundle that exists.

        Raises:
            CapaError: there is no manifest, or this version cannot read it.
        """
        bundle = cls(folder)
        if not (folder / MANIFEST).is_file():
            raise CapaError(f"{folder}: not a bundle (no {MANIFEST}); `capa-export build` makes one")
        version = bundle.manifest.get("version")
        if version != _VERSION:
            raise CapaError(
                f"{folder / MANIFEST}: version {version}, this capa-export reads {_VERSION}; build it again"
            )
        return bundle

    @property
    def manifest(self) -> dict[str, Any]:
        """What is recorded so far; empty for a new bundle.

        Raises:
            CapaError: the manifest is damaged.
        """
        path = self.folder / MANIFEST
        if not path.exists():
            return {"version": _VERSION, "stages": {}}
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            return data if isinstance(data["stages"], dict) else {}
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CapaError(f"{path}: damaged manifest ({error}); delete the folder and build it again") from error

    def update(self, **entries: Any) -> None:
        """Set top-level entries of the manifest, atomically."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f"{MANIFEST}{_PARTIAL}"
        partial.write_text(json.dumps({**self.manifest, **entries}, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, self.folder / MANIFEST)

    def stage(self, name: str) -> dict[str, Any]:
        """Record of a finished stage.

        Raises:
            CapaError: the stage has not run.
        """
        stages = self.manifest["stages"]
        if name not in stages:
            raise CapaError(
                f"{self.folder}: stage {name!r} has not run; `capa-export build --out {self.folder}` runs it"
            )
        return stages[name]

    def digest(self, name: str) -> str:
        """Of all that a finished stage wrote or linked to."""
        record = self.stage(name)
        return digest_of([record["files"], record.get("linked")])

    def is_current(self, name: str, key: str) -> bool:
        """Whether the stage ran from the same inputs and its files are still what it wrote."""
        record = self.manifest["stages"].get(name)
        return bool(record) and record["key"] == key and not self._changed(record)

    def record(
        self,
        name: str,
        key: str,
        files: Sequence[str],
        *,
        outdates: Sequence[str] = (),
        linked: Mapping[str, str | None] = MappingProxyType({}),
        sha256: Mapping[str, str] = MappingProxyType({}),
        **entries: Any,
    ) -> None:
        """Note that a stage is done, and drop the stages that were made from what it replaced.

        Args:
            name: of the stage.
            key: digest of its inputs.
            files: what it wrote, relative to the folder.
            outdates: beginnings of the names of later stages.
            linked: those of the files that are links to the checkpoint's, and their SHA-256 where it is known; they
                are not read.
            sha256: of files where the writer took it on the way; the others are read.
            entries: whatever else is worth keeping.
        """
        stages = self.manifest["stages"]
        old = {other for other in stages if other != name and other.startswith(tuple(outdates))}
        own = sorted(set(files) - set(linked))
        digests = {file: sha256.get(file) or file_digest(self.folder / file) for file in own}
        links = {file: {**fingerprint(self.folder / file), "sha256": digest} for file, digest in linked.items()}
        kept = {other: record for other, record in stages.items() if other not in old}
        self.update(stages={**kept, name: {"key": key, **entries, "files": digests, "linked": links}})
        for file in (file for other in old for file in _files(stages[other])):
            path = self.folder / file
            path.unlink(missing_ok=True)
            for parent in path.relative_to(self.folder).parents[:-1]:
                with suppress(OSError):
                    # Only succeeds where nothing is left.
                    (self.folder / parent).rmdir()

    def verify(self, *names: str) -> None:
        """Check that the files of these stages are what was built.

        Raises:
            CapaError: a file is missing or was changed, or a stage has not run.
        """
        for name in names:
            if changed := self._changed(self.stage(name)):
                linked = changed[0] not in self.stage(name)["files"]
                how = "size, time or header differ" if linked else "sha256 differs"
                raise CapaError(
                    f"{self.folder / changed[0]}: missing or changed since it was built ({how} from "
                    f"{MANIFEST}); build again, or copy the bundle again{', with its times (cp -a)' if linked else ''}"
                )

    def _changed(self, record: Mapping[str, Any]) -> list[str]:
        paths = {file: self.folder / file for file in _files(record)}

        def same(file: str, path: Path) -> bool:
            if file in record["files"]:
                return file_digest(path) == record["files"][file]
            known = dict(record["linked"][file])
            digest = known.pop("sha256")
            # A copy of the bundle may have other times.
            return fingerprint(path) == known or (digest is not None and file_digest(path) == digest)

        return [file for file, path in paths.items() if not path.is_file() or not same(file, path)]

    @contextmanager
    def replacing(self, *outputs: str) -> Generator[Path]:
        """A scratch folder whose `outputs` take their place in the bundle if the block succeeds, and vanish if not.

        Raises:
            CapaError: the folder is somebody's own, or cannot be written, or the disk is full.
        """
        scratch = self.folder / _PARTIAL
        self._claim(scratch)
        try:
            yield scratch
            for output in outputs:
                _put(scratch / output, self.folder / output)
        except OSError as error:
            if error.errno not in _DISK_ERRORS:
                raise
            raise CapaError(
                f"{self.folder}: {error.strerror}; free some space and run the same command again", ExitCode.EXPORT
            ) from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            with suppress(OSError):
                # Only succeeds where nothing was made.
                self.folder.rmdir()

    def _claim(self, scratch: Path) -> None:
        """Make the scratch folder, unless the bundle's folder holds what is not ours."""
        try:
            foreign = [path for path in self.folder.iterdir() if not path.name.endswith(_PARTIAL)]
            if foreign and not (self.folder / MANIFEST).is_file():
                raise CapaError(
                    f"{self.folder}: holds {foreign[0].name} and no {MANIFEST}; choose an empty or a new folder",
                    ExitCode.USAGE,
                )
            shutil.rmtree(scratch, ignore_errors=True)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise CapaError(f"{self.folder}: {error.strerror}; choose another folder") from error
        try:
            scratch.mkdir(parents=True)
        except OSError as error:
            raise CapaError(f"{self.folder}: {error.strerror}; choose a folder that can be written") from error

    def files_under(self, *outputs: str) -> list[str]:
        """Relative names of all files at or below the given outputs."""
        roots = [self.folder / output for output in outputs]
        files = [file for root in roots for file in ([root] if root.is_file() else root.rglob("*")) if file.is_file()]
        return sorted(file.relative_to(self.folder).as_posix() for file in files)

    def run_stage(
        self,
        name: str,
        key: object,
        outputs: Sequence[str],
        work: Callable[[Path], dict[str, Any]],
        *,
        outdates: Sequence[str] = (),
    ) -> tuple[dict[str, Any], bool]:
        """Do the work unless its outputs are current; returns the stage's record and whether it ran.

        `key` may be a function, which is then called before the work only where it may make the work superfluous.
        Of what `work` returns, `linked` and `sha256` are for `record`.
        """

        def digest() -> str:
            return digest_of(key() if callable(key) else key)

        if name in self.manifest["stages"] and self.is_current(name, digest()):
            return self.stage(name), False
        from capa_export.measure import measured

        with self.replacing(*outputs) as scratch, measured() as cost:
            result = work(scratch)
        files = self.files_under(*outputs)
        entries: dict[str, Any] = {
            "linked": result.pop("linked", {}),
            "sha256": result.pop("sha256", {}),
            **cost.as_dict(),
        }
        self.record(name, digest(), files, outdates=outdates, result=result, **entries)
        return self.stage(name), True


def _files(record: Mapping[str, Any]) -> list[str]:
    return [*record["files"], *record.get("linked", ())]


def _put(source: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.is_dir():
        old = place.with_name(f"{place.name}{_PARTIAL}")
        # Left behind by an interruption.
        shutil.rmtree(old, ignore_errors=True)
        place.rename(old)
        source.rename(place)
        shutil.rmtree(old)
    else:
        os.replace(source, place)
