"""The bundle folder: what is in it, what made it, and whether it still is what was built."""

import os
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

from capa_export.base.errors import CapaError
from capa_export.base.files import file_digest, fingerprint, remove, replacing
from capa_export.base.progress import say
from capa_export.bundle.confined import ONNX, confined
from capa_export.bundle.manifest import MANIFEST, VERSION, digest_of, encode_manifest, parse_manifest
from capa_export.bundle.replacement import SCRATCH, commit, is_committed, leftovers
from capa_export.bundle.signature import check_signature, read_public_key, signature_of
from capa_export.bundle.stamps import Stamps
from capa_export.bundle.verification import files_of, is_same, recorded_files, verify_files
from capa_export.bundle.workplace import Workplace

__all__ = ["MANIFEST", "ONNX", "PARITY", "REPORT", "Bundle", "digest_of", "file_digest", "files_under", "run_stage"]

PARITY = "parity.json"
REPORT = "report.html"


@dataclass(frozen=True)
class Bundle(Workplace):
    """A folder with a manifest; every stage's outputs are recorded with the key of what they were made from.

    Digests show what changed since it was built, the manifest's own included. They say nothing about who built it:
    whoever can write the folder can write digests that fit. A signature of the manifest does.
    """

    read_all: bool = False
    """Whether to read even files whose size, time and inode are as they were when they were last read."""
    signing: bool = False
    """Whether a change may take the manifest's signature away, since it is signed anew when the work is done."""

    @classmethod
    def open(cls, folder: Path, *, read_all: bool = False, verify_key: Path | None = None) -> "Bundle":
        """A bundle that exists.

        Args:
            folder: with a manifest.
            read_all: whether to read even files that seem unchanged since they were last read.
            verify_key: file of the public key that must have signed the manifest; every file is then read.

        Raises:
            CapaError: there is no manifest, or it is damaged, or of another version, or not signed with that key.
        """
        bundle = cls(folder, read_all or verify_key is not None)
        if verify_key is None:
            bundle.settle()
        if not (folder / MANIFEST).is_file():
            raise CapaError(f"{folder}: not a bundle (no {MANIFEST}); `capa-export build` makes one")
        if verify_key is not None:
            check_signature(folder / MANIFEST, read_public_key(verify_key, folder), verify_key)
            if is_committed(folder):
                raise CapaError(f"{folder}: a change of what was signed was interrupted; sign it anew when it is done")
        _ = bundle.manifest
        return bundle

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest's entries without its own digest; only a version for a new bundle.

        Raises:
            CapaError: the manifest is damaged, was changed, or is of another version.
        """
        self.settle()
        path = confined(self.folder, MANIFEST)
        if not path.exists():
            return {"version": VERSION, "stages": {}}
        try:
            return parse_manifest(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise CapaError(f"{path}: damaged manifest ({error}); delete the folder and build it again") from error

    def settle(self) -> None:
        """Finish the replacement of a stage that was interrupted, so that the files are those of the manifest.

        Raises:
            CapaError: another process is at work in the folder, or it cannot be written.
        """
        if not is_committed(self.folder):
            return
        if not os.access(self.folder, os.W_OK):
            raise CapaError(
                f"{self.folder}: a command was interrupted while it put files into their places; "
                f"`capa-export inspect {shlex.quote(str(self.folder))}` does the rest where the folder can be written"
            )
        try:
            with self.claimed():
                pass
        except CapaError:
            # The process at work has put them there by now.
            if is_committed(self.folder):
                raise

    def update(self, **entries: Any) -> None:
        """Set top-level entries of the manifest, all or none.

        Raises:
            CapaError: the folder is somebody's own, or cannot be written, or another process is at work in it, or the
                manifest is signed, and would change.
            ValueError: an entry is not what the manifest holds; nothing has changed.
        """
        with self.claimed():
            before = self.manifest
            if (after := {**before, **entries}) != before:
                data = encode_manifest(after)
                # One that could not be read again would leave no bundle at all.
                parse_manifest(data)
                self.unsign()
                with replacing(self.folder / MANIFEST) as file:
                    file.write(data)

    def replace(self, outputs: Iterable[str], *, drops: Iterable[str] = (), **entries: Any) -> None:
        """Put outputs in their places, set top-level entries of the manifest, and remove what it lists no more.

        All of it is done or nothing, whenever this process or the machine ends. Signatures go with their files.

        Args:
            outputs: files and folders, relative to the scratch folder, which is used up, and to the bundle's.
            drops: other files and folders that go.
            entries: of the manifest.

        Raises:
            CapaError: the manifest is signed, and the caller will not sign it.
        """
        self.require_unsigned()
        before = self.manifest
        after = {**before, **entries}
        gone = recorded_files(before["stages"]) - recorded_files(after["stages"])
        signatures = (signature_of(PurePosixPath(name)).as_posix() for name in (MANIFEST, *gone))
        signed = [name for name in signatures if os.path.lexists(self.folder / name)]
        commit(self.folder, after, outputs, [*sorted(gone), *signed, *drops])

    def require_unsigned(self) -> None:
        """Refuse, before the work, what would take a signature away that is not written anew.

        Raises:
            CapaError: the manifest is signed, and the caller will not sign it.
        """
        signature = signature_of(self.folder / MANIFEST)
        if not self.signing and os.path.lexists(signature):
            raise CapaError(
                f"{self.folder}: is signed, and this would change it; sign it again with --sign KEY, or remove "
                f"{signature.name}"
            )

    def unsign(self) -> None:
        """Take the manifest's signature away.

        Raises:
            CapaError: the manifest is signed, and the caller will not sign it.
        """
        self.require_unsigned()
        remove(signature_of(self.folder / MANIFEST))

    def stage(self, name: str) -> dict[str, Any]:
        """Record of a finished stage.

        Raises:
            CapaError: the stage has not run.
        """
        stages = self.manifest["stages"]
        if name not in stages:
            raise CapaError(f"{self.folder}: stage {name!r} has not run; `{self._command(name)}` runs it")
        return stages[name]

    def said(self, name: str, key: str) -> Any:
        """What the result of a finished stage has under a key.

        Raises:
            CapaError: the stage has not run, or its result has no such key.
        """
        result = self.stage(name).get("result", {})
        if key not in result:
            raise CapaError(
                f"{self.folder}: stage {name!r} says nothing of {key}; `{self._command(name)}` runs it again"
            )
        return result[key]

    def _command(self, name: str) -> str:
        """The command that runs a stage."""
        stage, _, target = name.partition("/")
        folder = shlex.quote(str(self.folder))
        if stage == "engine":
            return f"capa-export engine {folder} --target {shlex.quote(target)}"
        if stage in ("validate", "golden"):
            return f"capa-export validate {folder}{' --store-golden N' if stage == 'golden' else ''}"
        return f"capa-export build -m MODEL -o {folder}"

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
        outputs: Sequence[str],
        *,
        outdates: Sequence[str] = (),
        about: Mapping[str, Any] = MappingProxyType({}),
        linked: Mapping[str, str | None] = MappingProxyType({}),
        sha256: Mapping[str, str] = MappingProxyType({}),
        **entries: Any,
    ) -> None:
        """Replace a stage: its outputs, its record, and the stages that were made from what it replaces, which go.

        Args:
            name: of the stage.
            key: digest of its inputs.
            outputs: files and folders, relative to the scratch folder, which is used up, and to the bundle's.
            outdates: beginnings of the names of later stages.
            about: top-level entries of the manifest that belong to it.
            linked: those of the files that are links to the checkpoint's, and their SHA-256 where it is known; they
                are not read.
            sha256: of files where the writer took it on the way; the others are read.
            entries: whatever else is worth keeping.
        """
        scratch = self.folder / SCRATCH
        own = [file for file in files_under(scratch, *outputs) if file not in linked]
        digests = {file: sha256.get(file) or file_digest(scratch / file) for file in own}
        links = {file: {**fingerprint(scratch / file), "sha256": digest} for file, digest in linked.items()}
        record = {"key": key, **entries, "files": digests, "linked": links}
        stages = {
            other: kept
            for other, kept in self.manifest["stages"].items()
            if other == name or not other.startswith(tuple(outdates))
        }
        drops = [path.name for path in [self.unfinished_folder(name)] if path.exists()]
        self.replace(outputs, drops=drops, **about, stages={**stages, name: record})

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
        before = self.manifest["stages"]
        with Stamps.of(self.folder, read_all=self.read_all) as stamps:
            try:
                for name in names:
                    verify_files(self.folder, self.stage(name), recorded_files(before), stamps, weights=weights)
            except (CapaError, OSError):
                if self.manifest["stages"] == before:
                    raise
        # Another command may have replaced a stage in the meantime.
        same = self.manifest["stages"] == before
        return stamps.num_unread if same else self.verify(*names, weights=weights)

    def _changed(self, record: Mapping[str, Any]) -> bool:
        with Stamps.of(self.folder, read_all=self.read_all) as stamps:
            return not all(is_same(self.folder, record, file, stamps) for file in files_of(record))

    def run_stage(
        self,
        name: str,
        key: object,
        outputs: Sequence[str],
        work: Callable[[Path], dict[str, Any]],
        *,
        outdates: Sequence[str] = (),
        about: Callable[[], dict[str, Any]] = dict,
    ) -> tuple[dict[str, Any], bool]:
        """Do the work unless its outputs are current; returns the stage's record and whether it ran.

        `key` may be a function, which is then called before the work only where it may make the work superfluous.
        Of what `work` returns, `linked` and `sha256` are for `record`. `about` says, after the work, what else the
        manifest is to hold.
        """

        def digest() -> str:
            return digest_of(key() if callable(key) else key)

        if name in self.manifest["stages"] and self.is_current(name, digest()):
            if entries := about():
                self.update(**entries)
            elif leftovers(self.folder):
                self.tidy()
            return self.stage(name), False
        self.require_unsigned()
        from capa_export.base.machine import measured

        with self.scratch(*outputs) as scratch:
            with measured() as cost:
                result = work(scratch)
            given = {part: result.pop(part, {}) for part in ("linked", "sha256")}
            recorded: Any = {"about": about(), "outdates": outdates, **given, "result": result, **cost.as_dict()}
            self.record(name, digest(), outputs, **recorded)
            return self.stage(name), True


def run_stage(
    bundle: Bundle,
    name: str,
    key: object,
    outputs: Sequence[str],
    work: Callable[[Path], dict[str, Any]],
    *,
    outdates: Sequence[str] = (),
    about: Callable[[], dict[str, Any]] = dict,
) -> dict[str, Any]:
    """Run a stage of a bundle unless it is current, and say what it took; returns its result."""
    record, ran = bundle.run_stage(name, key, outputs, work, outdates=outdates, about=about)
    took = f"{record['seconds']:.1f} s, {record['peak_memory_bytes'] / 1e9:.2f} GB" if ran else "up to date"
    say(f"{name:<14}{took}")
    return record["result"]


def files_under(folder: Path, *outputs: str) -> list[str]:
    """Names of all files at or below the given outputs, relative to their folder."""
    roots = [folder / output for output in outputs]
    files = [file for root in roots for file in ([root] if root.is_file() else root.rglob("*")) if file.is_file()]
    return sorted(file.relative_to(folder).as_posix() for file in files)
