"""Finds the folder of a checkpoint: a local one, or the hub's cache, which is filled as needed."""

import logging
import re
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from capa_export.base.errors import CapaError, ExitCode, first_line
from capa_export.bundle.confined import require_own

__all__ = ["find_folder", "full_source", "refetch", "require_own_file"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_CACHED = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)")
_LOCAL_DOWNLOADS = Path(".cache") / "huggingface" / "download"
"""Folder where `hf download --local-dir` keeps its records, below the one that it fills."""


def full_source(source: str) -> str:
    """The hub id, or the folder in full, so that it is found from anywhere."""
    folder = Path(source).expanduser()
    return str(folder.resolve()) if folder.is_dir() else source


def find_folder(source: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The local folder, or the one in the hub cache with the files that match `patterns`.

    Args:
        source: a local folder, or a hub id such as `owner/name`.
        revision: branch, tag or commit of a hub id.
        patterns: of the files to download, and of those that a local folder must not lack where it links to them.

    Raises:
        CapaError: it cannot be found, or one of these files is a link to a download that was not finished, or to what
            is none of the checkpoint's.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise CapaError(f"{source}: is a local folder; --revision only applies to hub ids", ExitCode.USAGE)
    elif folder.exists():
        raise CapaError(f"{source}: no such folder, it is a file; pass the folder that holds config.json and weights")
    elif _HUB_ID.fullmatch(source):
        folder = _downloaded(source, revision, patterns)
    else:
        raise CapaError(f"{source}: no such folder; pass a folder that holds config.json, or a hub id like owner/name")
    for path in sorted(folder.iterdir()):
        if any(fnmatch(path.name, pattern) for pattern in patterns):
            if path.is_symlink() and not path.exists():
                raise CapaError(f"{path}: is a link to a file that is not there; {refetch(folder)}")
            require_own_file(path, folder)
    return folder


def require_own_file(path: Path, folder: Path) -> None:
    """Hold a file of a checkpoint to its folder, or to the blobs of the hub's cache where the folder is a snapshot.

    Raises:
        CapaError: it leads elsewhere, as to a file that is none of the checkpoint's, or is no file.
    """
    require_own(path, folder, folder.parents[1] / "blobs" if folder.parent.name == "snapshots" else None)


def refetch(folder: Path) -> str:
    """A remedy for a file that a checkpoint's folder lacks, by where the folder came from."""
    cached = _CACHED.fullmatch(folder.parent.parent.name) if folder.parent.name == "snapshots" else None
    if cached:
        hub_id = f"{cached['owner']}/{cached['name']}"
        return (
            "its download into the hub cache was not finished: run "
            f"`hf download {hub_id} --revision {folder.name}`, which fetches what is missing"
        )
    if (folder / _LOCAL_DOWNLOADS).is_dir():
        return f"run `hf download OWNER/NAME --local-dir {folder}` again, which fetches what is missing"
    if repository := _CACHED.fullmatch(folder.name):
        return f"this is the hub's cache, not a model: pass {repository['owner']}/{repository['name']}"
    return "copy it from where the weights were published"


def _downloaded(hub_id: str, revision: str | None, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # One line says it: the client's own warnings and retries are noise above it.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    what = f"{hub_id}@{revision}" if revision else hub_id
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(patterns)))
    except GatedRepoError as error:
        problem, cause = "is gated; accept its licence on its hub page, then run `hf auth login`", error
    except RevisionNotFoundError as error:
        problem, cause = "the hub has no such revision; check the branch, tag or commit", error
    except RepositoryNotFoundError as error:
        problem, cause = "no such folder, and no such model on the hub; if it is private, run `hf auth login`", error
    except LocalEntryNotFoundError as error:
        where = f"run `hf download {hub_id}` where there is a network, and pass the folder it prints"
        problem, cause = f"no such folder, no hub within reach, and not in the local hub cache; {where}", error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        problem, cause = f"download failed: {first_line(error)}; run it again, files that are complete are kept", error
    raise CapaError(f"{what}: {problem}") from cause
