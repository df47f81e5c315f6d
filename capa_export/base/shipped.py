"""Finds the data folders `graphs/` and `engines/`, in a wheel and in a checkout alike."""

from pathlib import Path

__all__ = ["shipped", "shipped_names"]


def shipped(folder: str) -> Path:
    """Path of a shipped data folder: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / folder
    return installed if installed.is_dir() else package.parent / folder


def shipped_names(folder: str) -> list[str]:
    """Names of the TOML files in a shipped folder, sorted, without their suffix."""
    return sorted(path.stem for path in shipped(folder).glob("*.toml"))
