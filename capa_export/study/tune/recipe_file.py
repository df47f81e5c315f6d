"""Writes a recipe as the shipped ones are written: TOML with sections, and inline tables below them."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from capa_export.base.errors import CapaError, ExitCode
from capa_export.base.files import write_whole
from capa_export.config.recipe import Recipe

__all__ = ["recipe_text", "write_recipe"]

_SECTION_DEPTH = 2
"""Depth down to which tables are sections, as `[parity.fp16]`; deeper ones are written inline."""


def write_recipe(path: Path, recipe: Recipe, comment: str) -> None:
    """Write a recipe's file as a whole or not at all.

    Raises:
        CapaError: the file cannot be written.
    """
    try:
        write_whole(path, recipe_text(recipe, comment))
    except OSError as error:
        raise CapaError(f"{path}: cannot be written: {error.strerror}", ExitCode.EXPORT) from error


def recipe_text(recipe: Recipe, comment: str) -> str:
    """The TOML of a recipe, without its defaults; the file gives its name."""
    about = [f"# {' '.join(line.split())}" for line in comment.splitlines()]
    values = recipe.model_dump(exclude_unset=True, exclude_none=True, exclude={"name"})
    return "\n".join([*about, *_section((), values), ""])


def _section(path: tuple[str, ...], values: Mapping[str, Any]) -> Iterator[str]:
    sections = [key for key, value in values.items() if isinstance(value, dict) and len(path) < _SECTION_DEPTH]
    yield from (f"{key} = {_value(value)}" for key, value in values.items() if key not in sections)
    for key in sections:
        yield from ("", f"[{'.'.join((*path, key))}]")
        yield from _section((*path, key), values[key])


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{key} = {_value(entry)}' for key, entry in value.items())} }}" if value else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    # JSON's strings, whole numbers and booleans are TOML's, but for one character; a float is written as Python does.
    return repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
