"""What tells one file of weights from another without reading the weights."""

import hashlib
from pathlib import Path

__all__ = ["file_digest", "fingerprint"]


def file_digest(path: Path) -> str:
    """SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fingerprint(path: Path) -> dict[str, int | str]:
    """Size, time of the last change and SHA-256 of the header of a safetensors file; of another file, of all of it."""
    status = path.stat()
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little") if path.suffix == ".safetensors" else status.st_size
        header = hashlib.sha256(file.read(length)).hexdigest()
    return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "header_sha256": header}
