"""The bundle folder: what is in it, what made it, and whether it still is what was built."""

import errno
import os
import shlex
import shutil
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from posixpath import normpath
from types import MappingProxyType
from typing import Any

from capa_export.base.errors import CapaError, ExitCode, NotFiniteError
from capa_export.base.files import file_digest, fingerprint
from capa_export.base.progress import say
from capa_export.bundle.confined import confined, references
from capa_export.bundle.lock import locked
from capa_export.bundle.manifest import VERSION, digest_of, encode_manifest, parse_manifest
from capa_export.bundle.stamps import Stamps

__all__ = ["MANIFEST", "ONNX", "PARITY", "REPORT", "Bundle", "digest_of", "file_digest", "run_stage"]

MANIFEST = "capa_manifest.json"
ONNX = "onnx"
"""Folder of the graphs."""
PARITY = "parity.json"
REPORT = "report.html"
_PARTIAL = ".partial"
_WEIGHTS = (".data", ".safetensors")
"""Endings of the names of large files."""
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


@dataclass(frozen=True)
class Bundle:
    """A folder with a manifest; every stage's outputs are recorded with the key of what they were made from.

    Digests show what changed since it was built, the manifest's own included. They say nothing about who built it:
    whoever can write the folder can write digests that fit.
    """

    folder: Path
    read_all: bool = False
    """Whether to read even files whose size, time and inode are as they were when they were last read."""

    @classmethod
    def open(cls, folder: Path, *, read_all: bool = False) -> "Bundle":
        """A bundle that exists.

        Raises:
            CapaError: there is no manifest, or it is damaged, or of another version.
        """
        bundle = cls(folder, read_all)
        if not (folder / MANIFEST).is_file():
            raise CapaError(f"{folder}: not a bundle (no {MANIFEST}); `capa-export build` makes one")
        _ = bundle.manifest
        return bundle

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest's entries without its own digest; only a version for a new bundle.

        Raises:
            CapaError: the manifest is damaged, was changed, or is of another version.
        """
        path = confined(self.folder, MANIFEST)
        if not path.exists():
            return {"version": VERSION, "stages": {}}
        try:
            return parse_manifest(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise CapaError(f"{path}: damaged manifest ({error}); delete the folder and build it again") from error

    def update(self, **entries: Any) -> None:
        """Set top-level entries of the manifest, atomically."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f"{MANIFEST}{_PARTIAL}"
        # What lies there may be a link.
        _remove(partial)
        partial.write_bytes(encode_manifest({**self.manifest, **entries}))
        os.replace(partial, self.folder / MANIFEST)

    def stage(self, name: str) -> dict[str, Any]:
        """Record of a finished stage.

        Raises:
            CapaError: the stage has not run.
        """
        stages = self.manifest["stages"]
        if name not in stages:
            raise CapaError(f"{self.folder}: stage {name!r} has not run; `{self._command(name)}` runs it")
        return stages[name]

    def _command(self, name: str) -> str:
        """The command that runs a stage."""
        stage, _, target = name.partition("/")
        folder = shlex.quote(str(self.folder))
        if stage == "engine":
            return f"capa-export engine {folder} --target {shlex.quote(target)}"
        return f"capa-export validate {folder}" if stage == "validate" else f"capa-export build -m MODEL -o {folder}"

    def digest(self, name: str) -> str:
        """Digest of all that a finished stage wrote or linked to."""
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
        outdated = [confined(self.folder, file) for other in old for file in _files(stages[other])]
        self.update(stages={**kept, name: {"key": key, **entries, "files": digests, "linked": links}})
        _remove(self._unfinished(name))
        for path in outdated:
            path.unlink(missing_ok=True)
            for parent in path.relative_to(self.folder).parents[:-1]:
                with suppress(OSError):
                    # Only succeeds where nothing is left.
                    (self.folder / parent).rmdir()

    def verify(self, *names: str, weights: bool = True) -> int:
        """Check that the files of these stages are what was built, that they lead nowhere else, and are all there is.

        A file that was found to be so before, and has not changed since by size, time and inode, is not read again
        unless `read_all` is set.

        Args:
            names: of the stages.
            weights: whether to read the files of weights, too, which takes as long as they are large.

        Returns:
            How many files were not read.

        Raises:
            CapaError: a file is missing, was changed or added, or leads to one that is no file of the bundle, or a
                stage has not run.
        """
        with Stamps.of(self.folder, read_all=self.read_all) as stamps:
            for name in names:
                self._verify_stage(name, stamps, weights=weights)
        return stamps.num_unread

    def _verify_stage(self, name: str, stamps: Stamps, *, weights: bool) -> None:
        stages = self.manifest["stages"]
        known = {MANIFEST, *(file for record in stages.values() for file in _files(record))}
        record = self.stage(name)
        files = [file for file in _files(record) if weights or not file.endswith(_WEIGHTS)]
        for file in set(_files(record)).difference(files):
            if not confined(self.folder, file).is_file():
                raise CapaError(f"{self.folder / file}: missing; build again, or copy the bundle again")
        for file in files:
            if not self._is_same(record, file, stamps, read_links=True):
                by_time = file not in record["files"] and record["linked"][file]["sha256"] is None
                how = "size, time or header differ" if by_time else "sha256 differs"
                raise CapaError(
                    f"{self.folder / file}: missing or changed since it was built ({how} from {MANIFEST}); build "
                    f"again, or copy the bundle again{', with its times (cp -a)' if by_time else ''}"
                )
        for file in files:
            for target in references(self.folder / file):
                if normpath(PurePosixPath(file).parent / target) not in known:
                    raise CapaError(
                        f"{self.folder / file}: reads {target}, which is no file of this bundle; build it again"
                    )
        for path in self._beside_graphs(files):
            if path.relative_to(self.folder).as_posix() not in known:
                raise CapaError(f"{path}: was added since the bundle was built; remove it, since it might be read")

    def _beside_graphs(self, files: Sequence[str]) -> list[Path]:
        """Files that readers of a graph's folder find: a tokenizer, a template, an embedding."""
        folders = {self.folder / PurePosixPath(file).parent for file in files if file.endswith(".onnx")}
        paths = {path for folder in folders for path in folder.rglob("*")}
        return sorted(path for path in paths if (path.is_symlink() or not path.is_dir()) and path.name[0] != ".")

    def _changed(self, record: Mapping[str, Any]) -> bool:
        with Stamps.of(self.folder, read_all=self.read_all) as stamps:
            return not all(self._is_same(record, file, stamps) for file in _files(record))

    def _is_same(self, record: Mapping[str, Any], file: str, stamps: Stamps, *, read_links: bool = False) -> bool:
        """Whether a file is there, and is what a stage wrote or linked to.

        Args:
            record: of the stage.
            file: its name.
            stamps: of files that need not be read.
            read_links: whether a link's size, time and header are not enough where its digest is known.
        """
        path = confined(self.folder, file)
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

    @contextmanager
    def replacing(self, *outputs: str) -> Generator[Path]:
        """A scratch folder whose `outputs` take their place in the bundle if the block succeeds, and vanish if not.

        Raises:
            CapaError: the folder is somebody's own, or cannot be written, or the disk is full.
        """
        scratch = self.folder / _PARTIAL
        for output in outputs:
            confined(self.folder, output)
        with self.claimed():
            try:
                _remove(scratch)
                scratch.mkdir()
                yield scratch
                for output in outputs:
                    _put(scratch / output, confined(self.folder, output))
            except OSError as error:
                if error.errno not in _DISK_ERRORS:
                    raise
                raise CapaError(
                    f"{self.folder}: {error.strerror}; free some space and run the same command again", ExitCode.EXPORT
                ) from error
            finally:
                shutil.rmtree(scratch, ignore_errors=True)

    @contextmanager
    def claimed(self) -> Generator[None]:
        """Keep other processes from writing into the folder until the block ends; blocks may be nested.

        Raises:
            CapaError: the folder is somebody's own, or cannot be written, or another process is at work in it.
        """
        self._refuse_foreign()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CapaError(f"{self.folder}: {error.strerror}; choose a folder that can be written") from error
        try:
            with locked(self.folder):
                yield
        finally:
            with suppress(OSError):
                # Only succeeds where nothing was made.
                self.folder.rmdir()

    def _refuse_foreign(self) -> None:
        try:
            foreign = [path for path in self.folder.iterdir() if not path.name.endswith(_PARTIAL)]
        except FileNotFoundError:
            return
        except OSError as error:
            raise CapaError(f"{self.folder}: {error.strerror}; choose another folder") from error
        if foreign and not (self.folder / MANIFEST).is_file():
            raise CapaError(
                f"{self.folder}: holds {foreign[0].name} and no {MANIFEST}; choose an empty or a new folder",
                ExitCode.USAGE,
            )

    @contextmanager
    def unfinished(self, name: str, key: object) -> Generator[Path]:
        """A folder for work on a stage that outlives an interruption, until the stage is recorded.

        A failure leaves it as well, unless nothing is in it or the model was found to be at fault.

        Args:
            name: of the stage.
            key: of the work; what was begun with another one is dropped.
        """
        folder, begun = self._unfinished(name), self._begun(name, key)
        if not begun.is_file():
            _remove(folder)
            folder.mkdir(parents=True)
            begun.touch()
        try:
            yield folder
        except CapaError as error:
            if isinstance(error, NotFiniteError) or list(folder.iterdir()) == [begun]:
                _remove(folder)
            raise

    def interrupted(self, name: str, key: object) -> Path | None:
        """The folder of work that `unfinished` began with the same key, if there is one."""
        return self._unfinished(name) if self._begun(name, key).is_file() else None

    def _begun(self, name: str, key: object) -> Path:
        """The file that holds the key of unfinished work on a stage."""
        return self._unfinished(name) / digest_of(key)

    def _unfinished(self, name: str) -> Path:
        return self.folder / f".{name.replace('/', '-')}{_PARTIAL}"

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
        from capa_export.base.machine import measured

        with self.claimed():
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


def run_stage(
    bundle: Bundle,
    name: str,
    key: object,
    outputs: Sequence[str],
    work: Callable[[Path], dict[str, Any]],
    *,
    outdates: Sequence[str] = (),
) -> dict[str, Any]:
    """Run a stage of a bundle unless it is current, and say what it took; returns its result."""
    record, ran = bundle.run_stage(name, key, outputs, work, outdates=outdates)
    took = f"{record['seconds']:.1f} s, {record['peak_memory_bytes'] / 1e9:.2f} GB" if ran else "up to date"
    say(f"{name:<14}{took}")
    return record["result"]


def _files(record: Mapping[str, Any]) -> list[str]:
    return [*record["files"], *record.get("linked", ())]


def _put(source: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.is_dir():
        old = place.with_name(f"{place.name}{_PARTIAL}")
        # Left behind by an interruption.
        _remove(old)
        place.rename(old)
        source.rename(place)
        shutil.rmtree(old)
    else:
        os.replace(source, place)


def _remove(path: Path) -> None:
    """Remove a file, a link or a folder; the target of a link stays."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)
