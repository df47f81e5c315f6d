"""Finds the model's chat template among those in a checkpoint's folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from capa_export.base.errors import CapaError

__all__ = ["TEMPLATE_FILES", "read_chat_template"]

TEMPLATE_FILES = (
    "processor_config.json",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "tokenizer_config.json",
)
"""Files that may hold templates; the first that has one wins, and a later one may name others beside it."""

_ADDITIONAL = "additional_chat_templates"


def read_chat_template(folder: Path) -> str | None:
    """The template that transformers' processor of the folder applies, or else its tokenizer's; None without any.

    Raises:
        CapaError: a file holds no template, or there are several and none of them is the default.
    """
    processor = folder / "processor_config.json"
    if (given := _entry(processor)) is not None:
        return _default(processor, given)
    additional, legacy = folder / _ADDITIONAL, folder / "chat_template.json"
    named = {path.stem: path for path in sorted(additional.glob("*.jinja"))}
    if legacy.is_file():
        if named:
            raise CapaError(
                f"{legacy}: transformers does not take it beside {_ADDITIONAL}; "
                f"move the template that it holds to chat_template.jinja"
            )
        if (given := _entry(legacy)) is None:
            raise CapaError(f"{legacy}: holds no chat template; copy it from where the weights were published")
        return _default(legacy, given)
    if (default := folder / "chat_template.jinja").is_file():
        named["default"] = default
    if named:
        where = additional if additional.is_dir() else default
        return _default(where, {name: _text(path) for name, path in named.items()})
    tokenizer = folder / "tokenizer_config.json"
    given = _entry(tokenizer)
    return None if given is None else _default(tokenizer, given)


def _entry(path: Path) -> object:
    """The chat template's entry in a JSON file; None where it has none, or is not there."""
    if not path.is_file():
        return None
    try:
        data = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise CapaError(f"{path}: holds no chat template, and cannot be read as JSON; download it again") from error
    return cast("dict[str, Any]", data).get("chat_template") if isinstance(data, dict) else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CapaError(f"{path}: holds no chat template, and cannot be read; download it again") from error


def _default(path: Path, given: object) -> str:
    """The template itself, or of several the one that is named `default`."""
    if isinstance(given, list):
        entries = [entry for entry in cast("list[object]", given) if isinstance(entry, dict)]
        given = {entry.get("name"): entry.get("template") for entry in cast("list[dict[str, object]]", entries)}
    if isinstance(given, Mapping):
        named = cast("Mapping[object, object]", given)
        if "default" not in named:
            raise CapaError(
                f"{path}: holds no chat template that is the default, only {', '.join(map(str, named)) or 'none'}; "
                "put the one to use into chat_template.jinja"
            )
        given = named["default"]
    if not isinstance(given, str):
        raise CapaError(f"{path}: holds no chat template, which is a text; copy the published file")
    return given
