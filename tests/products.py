"""Products of parameters, of which `make test` runs as many as show every value once, and `make test-all` the rest."""

from collections.abc import Collection
from itertools import product
from typing import Any

import pytest

__all__ = ["once_each"]


def once_each(*parameters: Collection[Any]) -> list[Any]:
    """Every combination of the parameters' values; those that are not needed to show each value are exhaustive.

    A tuple among the values is of several parameters that go together.
    """
    lists = [list(values) for values in parameters]
    # Whenever a list begins again, it does so further on the further back it stands: two short ones go unlike ways.
    needed = {
        tuple((step + place * (step // len(values))) % len(values) for place, values in enumerate(lists))
        for step in range(max(map(len, lists)))
    }
    entries: list[Any] = []
    for indices in product(*(range(len(values)) for values in lists)):
        chosen = [values[index] for values, index in zip(lists, indices, strict=True)]
        flat = [part for value in chosen for part in (value if isinstance(value, tuple) else (value,))]
        entries.append(pytest.param(*flat, marks=() if indices in needed else pytest.mark.exhaustive))
    return entries
