"""Digests of code, and versions of packages: a cached result depends on those that made it."""

import ast
import hashlib
import json
from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

__all__ = ["digest_code", "find_code", "versions"]

_PACKAGE = __name__.partition(".")[0]
_APART = tuple(
    f"{_PACKAGE}.{name}."
    for name in (
        "base.code",
        "base.components",
        "base.disk",
        "base.errors",
        "base.files",
        "base.interrupts",
        "base.machine",
        "base.progress",
        "base.workers",
        "bundle",
    )
)
"""Modules that nearly all others import and that change no result: they keep and check files, look for room, run tasks
in processes, and talk to the user."""
_TELLING = (ast.Constant, ast.Expr, ast.If, ast.Import, ast.ImportFrom, ast.JoinedStr)
"""Kinds of nodes that may import a module, or are no code."""


def versions(*packages: str, code_of: Sequence[str]) -> dict[str, str]:
    """The installed versions of packages, and the digest of the code of the modules that `code_of` names."""
    return {"code": digest_code(*code_of), **{package: _installed(package) for package in packages}}


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


@cache
def digest_code(*modules: str) -> str:
    """SHA-256 of the code of modules and of all that they import, as `find_code` finds it."""
    return hashlib.sha256(json.dumps(find_code(*modules), sort_keys=True).encode()).hexdigest()


def find_code(*modules: str) -> dict[str, str]:
    """SHA-256 of modules, and of the modules of this package and of their own that they import, by name.

    Comments, docstrings and what stands under `if TYPE_CHECKING` do not count, nor do the modules of `_APART` and the
    `__init__.py` of a whole package. Imports inside functions count, and so do modules that a string names, as for
    `python -m`. An f-string that begins with `{__name__}.` or `{__package__}.` imports all modules of the package.
    Data files count with a module beside them, or beside their folder, that reads `__file__`.
    """
    files = {name: path for top in (_PACKAGE, *modules) for name, path in _files(top.partition(".")[0]).items()}
    assert files.keys() >= set(modules), f"no such module: {sorted(set(modules) - files.keys())}"
    found: dict[str, str] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if name.endswith(".*"):
            waiting += [other for other in files if other.startswith(name[:-1])]
        elif name in files and name not in found and not f"{name}.".startswith(_APART):
            found[name], imports = _read(name, files[name])
            waiting += imports
    return found


@cache
def _files(top: str) -> dict[str, Path]:
    """The files of all modules of a package, by the modules' names."""
    spec = find_spec(top)
    assert spec is not None and spec.submodule_search_locations is not None, f"no such package: {top}"
    files: dict[str, Path] = {}
    for folder in map(Path, spec.submodule_search_locations):
        for path in folder.rglob("*.py"):
            *parents, stem = path.relative_to(folder).with_suffix("").parts
            files[".".join([top, *parents, *([] if stem == "__init__" else [stem])])] = path
    files.pop(top, None)
    return files


@cache
def _read(name: str, path: Path) -> tuple[str, frozenset[str]]:
    """A module's SHA-256, and the names of all that it may import."""
    parent = name.rpartition(".")[0]
    digest, imports, reading = _parsed(path.read_bytes(), name if path.stem == "__init__" else parent)
    if reading is not None:
        whole = hashlib.sha256(reading)
        for data in _data_beside(path.parent):
            whole.update(f"\0{data.name}\0".encode() + data.read_bytes())
        digest = whole.hexdigest()
    return digest, imports | {parent}


@cache
def _parsed(text: bytes, package: str) -> tuple[str, frozenset[str], bytes | None]:
    """SHA-256 of the code of a module of `package`, the names that it may import, and its code if it reads data."""
    words, imports = list[str](), set[str]()
    _collect(ast.parse(text), package, words, imports)
    code = "\0".join(words).encode()
    return hashlib.sha256(code).hexdigest(), frozenset(imports), code if repr("__file__") in words else None


def _data_beside(folder: Path) -> list[Path]:
    """What a folder, and those in it that are no packages, hold beside modules."""
    below = (each for each in folder.iterdir() if each.is_dir() and each.name != "__pycache__")
    folders = [folder, *(each for each in below if not any(each.glob("*.py")))]
    return sorted(data for each in folders for data in each.iterdir() if data.is_file() and data.suffix != ".py")


def _collect(node: ast.AST, package: str, words: list[str], imports: set[str]) -> None:
    """Add the text of a node of a module of `package` to `words`, and the names that it may import to `imports`."""
    if isinstance(node, _TELLING):
        if _says_nothing(node):
            return
        imports.update(_imports(node, package))
    words.append(type(node).__name__)
    for field in node._fields:
        value = getattr(node, field, None)
        if isinstance(value, list):
            # Which fields are empty lists differs between versions of Python.
            words += [field] if value else []
            for item in value:
                if isinstance(item, ast.AST):
                    _collect(item, package, words, imports)
                else:
                    words.append(repr(item))
        elif not isinstance(value, ast.AST):
            words.append(repr(value))
        elif field != "ctx":
            _collect(value, package, words, imports)


def _says_nothing(node: ast.AST) -> bool:
    """Whether a node is a docstring, or for type checkers alone."""
    match node:
        case ast.Expr(value=ast.Constant(value=str())) | ast.If(test=ast.Name(id="TYPE_CHECKING"), orelse=[]):
            return True
        case _:
            return False


def _imports(node: ast.AST, package: str) -> list[str]:
    """Names of the modules that a node may import; `package.*` stands for all modules of the package."""
    match node:
        case ast.ImportFrom(module=str(module), names=names):
            return [module, *(f"{module}.{alias.name}" for alias in names)]
        case ast.Import(names=names):
            return [alias.name for alias in names]
        case ast.Constant(value=str(text)):
            return [text]
        case ast.JoinedStr(
            values=[
                ast.FormattedValue(value=ast.Name(id="__name__" | "__package__")),
                ast.Constant(value=str(text)),
                *_,
            ]
        ) if text.startswith("."):
            return [f"{package}.*"]
        case _:
            return []
