"""Versions of the tools that make a stage's result."""

from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import capa_export
from capa_export.bundle.store import digest_of, file_digest

__all__ = ["tool_versions"]


@cache
def _code_digest() -> str:
    """Of this package's own source: a version number does not change while one works on it."""
    package = Path(capa_export.__file__).parent
    return digest_of({str(path.relative_to(package)): file_digest(path) for path in sorted(package.rglob("*.py"))})


def tool_versions(*packages: str) -> dict[str, str]:
    """Versions that a stage's result depends on."""

    def installed(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    own = {"capa-export": capa_export.__version__, "code": _code_digest()}
    return {**own, **{package: installed(package) for package in packages}}
