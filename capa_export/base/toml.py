"""Reads TOML files, shipped or the user's, into frozen models that refuse unknown keys and wrong types."""

import sys
from collections.abc import Collection
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from capa_export.base.errors import CapaError, ExitCode
from capa_export.base.files import refuse_special

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["Settings", "first_problem", "read_toml", "shipped", "shipped_names"]

_GATES = "gates"
"""Shipped beside the recipes and read by them."""


_MOST_BYTES = 1 << 16
"""Of a file: ten times the largest that is shipped. The parser's time grows with the square of some of them."""


class Settings(BaseModel):
    """Base of everything read from a TOML file: immutable, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


T = TypeVar("T", bound=Settings)


def read_toml(path: Path, model: type[T], **extra: object) -> T:
    """Parse `path` as `model`; `extra` fills fields that the file itself does not hold.

    Raises:
        CapaError: the file is missing, is not TOML, or does not fit the model.
    """
    refuse_special(path)
    try:
        if path.is_file() and (size := path.stat().st_size) > _MOST_BYTES:
            raise CapaError(f"{path}: {size} bytes, and at most {_MOST_BYTES} are read", ExitCode.USAGE)
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CapaError(f"{path}: no such file", ExitCode.USAGE) from error
    except OSError as error:
        raise CapaError(f"{path}: {error.strerror}", ExitCode.USAGE) from error
    except (ValueError, RecursionError) as error:
        raise CapaError(f"{path}: {error}", ExitCode.USAGE) from error
    for key in extra:
        if key in data:
            known = _known_keys(model, extra)
            raise CapaError(f"{path}: unknown key {key}; known keys: {known}", ExitCode.USAGE)
    try:
        return model(**data, **extra)
    except ValidationError as error:
        raise CapaError(f"{path}: {first_problem(error, model, extra)}", ExitCode.USAGE) from error


def first_problem(error: ValidationError, model: type[BaseModel], filled: Collection[str] = ()) -> str:
    """Describe the first wrong key; `filled` are keys of `model` that no file may hold."""
    problem = error.errors()[0]
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        owner = _owner(model, problem["loc"])
        known = f"; known keys: {_known_keys(owner, filled if owner is model else ())}" if owner else ""
        return f"unknown key {key}{known}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{key}: {message}" if key else message


def _known_keys(model: type[BaseModel], filled: Collection[str]) -> str:
    return ", ".join(sorted(set(model.model_fields).difference(filled)))


def _owner(model: type[BaseModel], location: tuple[int | str, ...]) -> type[BaseModel] | None:
    """The nested model that refused the key at `location`; None where plain fields do not lead to it."""
    for part in location[:-1]:
        field = model.model_fields.get(str(part))
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return None
        model = field.annotation
    return model


def shipped(folder: str) -> Path:
    """Path of a shipped data folder: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / folder
    return installed if installed.is_dir() else package.parent / folder


def shipped_names(folder: str) -> list[str]:
    """Names of the recipes or targets in a shipped folder, sorted."""
    return sorted(path.stem for path in shipped(folder).glob("*.toml") if path.stem != _GATES)
