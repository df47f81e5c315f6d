"""Work in a bundle's folder: of one command at a time, put in order after an interruption, taken up where it can be."""

import errno
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from capa_export.base.errors import CapaError, ExitCode, NotFiniteError
from capa_export.base.files import PARTIAL, remove
from capa_export.bundle.confined import confined
from capa_export.bundle.lock import locked
from capa_export.bundle.manifest import MANIFEST, digest_of
from capa_export.bundle.replacement import COMMIT, SCRATCH, is_committed, sweep

__all__ = ["Workplace"]

_UNFINISHED = ".unfinished"
_OWN = (PARTIAL, _UNFINISHED, COMMIT)
"""Endings of the names of what an interruption leaves behind, which makes no folder somebody's own."""
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


@dataclass(frozen=True)
class Workplace:
    """A folder that is a bundle or becomes one."""

    folder: Path

    @contextmanager
    def scratch(self, *outputs: str) -> Generator[Path]:
        """A folder for outputs of the bundle, which vanishes when the block ends, unless they took their places.

        Raises:
            CapaError: the folder is somebody's own, or cannot be written, or the disk is full.
        """
        scratch = self.folder / SCRATCH
        for output in outputs:
            confined(self.folder, output)
        with self.claimed():
            try:
                remove(scratch)
                scratch.mkdir()
                yield scratch
            except OSError as error:
                if error.errno not in _DISK_ERRORS:
                    raise
                raise CapaError(
                    f"{self.folder}: {error.strerror}; free some space and run the same command again", ExitCode.EXPORT
                ) from error
            finally:
                remove(scratch)

    @contextmanager
    def claimed(self) -> Generator[None]:
        """Keep other processes from writing into the folder until the block ends; blocks may be nested.

        What an interruption left behind is put in order first.

        Raises:
            CapaError: the folder is somebody's own, or cannot be written, or another process is at work in it.
        """
        self._refuse_foreign()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CapaError(f"{self.folder}: {error.strerror}; choose a folder that can be written") from error
        try:
            with locked(self.folder) as outermost:
                if outermost:
                    sweep(self.folder)
                yield
        finally:
            with suppress(OSError):
                # Only succeeds where nothing was made.
                self.folder.rmdir()

    def tidy(self) -> None:
        """Remove what is left of commands that were killed, unless one is at work."""
        with suppress(CapaError), self.claimed():
            pass

    def _refuse_foreign(self) -> None:
        try:
            foreign = [path for path in self.folder.iterdir() if not path.name.endswith(_OWN)]
        except FileNotFoundError:
            return
        except OSError as error:
            raise CapaError(f"{self.folder}: {error.strerror}; choose another folder") from error
        if foreign and not (self.folder / MANIFEST).is_file() and not is_committed(self.folder):
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
        folder, begun = self.unfinished_folder(name), self._begun(name, key)
        if not begun.is_file():
            remove(folder)
            folder.mkdir(parents=True)
            begun.touch()
        try:
            yield folder
        except CapaError as error:
            if isinstance(error, NotFiniteError) or list(folder.iterdir()) == [begun]:
                remove(folder)
            raise

    def interrupted(self, name: str, key: object) -> Path | None:
        """The folder of work that `unfinished` began with the same key, if there is one."""
        return self.unfinished_folder(name) if self._begun(name, key).is_file() else None

    def _begun(self, name: str, key: object) -> Path:
        """The file that holds the key of unfinished work on a stage."""
        return self.unfinished_folder(name) / digest_of(key)

    def unfinished_folder(self, name: str) -> Path:
        """Where such work on a stage is."""
        return self.folder / f".{name.replace('/', '-')}{_UNFINISHED}"
