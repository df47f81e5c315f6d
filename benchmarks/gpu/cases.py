"""Cases: what a part of the benchmark runs one after the other, each on its own whatever becomes of the others."""

import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from capa_export.base.errors import CapaError

__all__ = ["Case", "CaseSkipped", "failure", "installed", "rows", "skip"]

Case: TypeAlias = tuple[str, Callable[[], dict[str, Any]]]
"""A case's name, and a function that measures it; its `ms` is the table's column, the rest stands beside it."""

_LONGEST = 300


class CaseSkipped(Exception):  # noqa: N818 - it is no error.
    """Why a case is not for this machine."""


def skip(reason: str) -> NoReturn:
    raise CaseSkipped(reason)


def installed(name: str, cases: Callable[[Path], Iterable[Case]], work: Path) -> Iterator[Case]:
    """The cases of a part; from where a module is missing on, one that is skipped and says which."""
    try:
        yield from cases(work)
    except CapaError as error:
        if not isinstance(error.__cause__, ImportError):
            raise
        yield name, partial(skip, str(error))
    except ModuleNotFoundError as error:
        if (reason := _missing(error)) is None:
            raise
        yield name, partial(skip, reason)


def _missing(error: ModuleNotFoundError) -> str | None:
    """What is not installed; None where it is a module of ours that there is not."""
    package = str(error.name).partition(".")[0]
    ours = package in ("None", "capa_export") or (Path(__file__).parent / f"{package}.py").exists()
    return None if ours else f"{package} is not installed"


def rows(cases: Iterable[Case]) -> Iterator[dict[str, Any]]:
    """A row for each case: `case`, `seconds`, and either what was measured, or `skipped`, or `error`, in one line."""
    for name, measure in cases:
        started = time.perf_counter()
        try:
            outcome = {"result": measure()}
        except CaseSkipped as reason:
            outcome = {"skipped": str(reason)}
        except ModuleNotFoundError as error:
            reason = _missing(error)
            outcome = {"error": failure(error)} if reason is None else {"skipped": reason}
        except Exception as error:  # noqa: BLE001 - whatever it is, the next case is run.
            outcome = {"error": failure(error)}
        yield {"case": name, "seconds": round(time.perf_counter() - started, 2), **outcome}


def failure(error: Exception) -> str:
    """An exception in one line."""
    line = " ".join(f"{type(error).__name__}: {error}".split())
    return line if len(line) <= _LONGEST else line[:_LONGEST].rsplit(" ", 1)[0] + " ..."
