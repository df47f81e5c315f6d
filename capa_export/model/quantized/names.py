"""The layers that a config names, as each format reads its list."""

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import cast

from capa_export.base.dims import Section
from capa_export.base.expressions import backtracks

__all__ = ["contains_any", "is_any", "matches_any", "names", "patterns"]


_REPEATS = re.compile(r"[*+,]")
_MOST_REPEATS = 6
"""One behind the other: a name of a hundred characters is divided among them in every way."""


def names(config: Section, key: str) -> tuple[str, ...]:
    """A list of names in a config, empty where the key is absent.

    Raises:
        CapaError: it is no list of names.
    """
    given = config.data.get(key) or ()
    if not isinstance(given, list | tuple):
        raise config.refused(key, "must be a list of names")
    entries = cast("list[object]", given)
    if not all(isinstance(name, str) for name in entries):
        raise config.refused(key, "must be a list of names")
    return tuple(map(str, entries))


def patterns(config: Section, key: str, given: Sequence[str]) -> tuple[str, ...]:
    """Names of layers, and expressions for them after `re:`.

    Raises:
        CapaError: an expression is none, or might never end.
    """
    for name in given:
        if name.startswith("re:"):
            try:
                re.compile(name[3:])
            except (re.error, OverflowError, RecursionError) as error:
                raise config.refused(key, f"{name!r:.80} is no regular expression: {error}") from error
            if backtracks(name[3:]) or len(_REPEATS.findall(name)) > _MOST_REPEATS:
                raise config.refused(key, f"{name!r:.80} repeats too much, and might never end")
    return tuple(given)


def contains_any(module: str, parts: Iterable[str]) -> bool:
    """Whether one of these is a part of a layer's name, as transformers reads `modules_to_not_convert`."""
    return any(f".{part}." in f".{module}." for part in parts)


def matches_any(module: str, patterns: Iterable[str]) -> bool:
    """Whether a layer's name is one of these patterns with asterisks, as ModelOpt reads `exclude_modules`."""
    return any(fnmatchcase(module, pattern) for pattern in patterns)


def is_any(module: str, given: Iterable[str]) -> bool:
    """Whether a layer's name is one of these, or begins as one after `re:` does, as in compressed-tensors' `ignore`."""
    return any(re.match(name[3:], module) if name.startswith("re:") else name == module for name in given)
