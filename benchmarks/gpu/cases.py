"""Cases: what a part of the benchmark runs one after the other, each on its own whatever becomes of the others."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn, TypeAlias

__all__ = ["Case", "CaseSkipped", "failure", "rows", "skip"]

Case: TypeAlias = tuple[str, Callable[[], dict[str, Any]]]
"""A case's name, and a function that measures it; its `ms` is the table's column, the rest stands beside it."""

_LONGEST = 300


class CaseSkipped(Exception):  # noqa: N818 - it is no error.
    """Why a case is not for this machine."""


def skip(reason: str) -> NoReturn:
    raise CaseSkipped(reason)


def rows(cases: Iterable[Case]) -> Iterator[dict[str, Any]]:
    """A row for each case: `case`, `seconds`, and either what was measured, or `skipped`, or `error`, in one line."""
    for name, measure in cases:
        started = time.perf_counter()
        try:
            outcome = {"result": measure()}
        except CaseSkipped as reason:
            outcome = {"skipped": str(reason)}
        except Exception as error:  # noqa: BLE001 - whatever it is, the next case is run.
            outcome = {"error": failure(error)}
        yield {"case": name, "seconds": round(time.perf_counter() - started, 2), **outcome}


def failure(error: Exception) -> str:
    """An exception in one line."""
    line = " ".join(f"{type(error).__name__}: {error}".split())
    return line if len(line) <= _LONGEST else line[:_LONGEST].rsplit(" ", 1)[0] + " ..."
