"""Puts figures into words: the same words for the same thing on every page."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from capa_export.base.statistics import Difference, Rate
from capa_export.config.schedule import Stage, parse_method

__all__ = [
    "better",
    "folded",
    "grid",
    "joined",
    "listed",
    "points",
    "rate",
    "stage_of",
    "table",
    "unsurpassed",
    "verdict",
    "worse",
]

T = TypeVar("T")


def stage_of(method: str) -> Stage:
    """The one that a method has."""
    (stage,) = parse_method(method).stages
    return stage


def rate(found: Rate | None) -> str:
    """A share with its interval."""
    return "" if found is None else f"{100 * found.value:.1f} ({100 * found.low:.0f}-{100 * found.high:.0f})"


def points(found: Difference | None, *, bare: bool = False) -> str:
    """A difference in points with its interval."""
    if found is None:
        return ""
    value, low, high = (100 * number for number in (found.value, found.low, found.high))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]" if bare else f"{abs(value):.1f} points [{low:+.1f}, {high:+.1f}]"


def better(found: Difference) -> bool:
    """Whether the whole interval lies above 0."""
    return found.low > 0


def worse(found: Difference) -> bool:
    return found.high < 0


def joined(parts: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, (", ".join(parts[:-1]), *parts[-1:])))


def listed(sentences: Iterable[str]) -> str:
    """The sentences as bullet points."""
    return "\n".join(f"- {sentence}" for sentence in sentences)


def folded(summary: str, text: str) -> str:
    """A text behind its summary, in the repository and on the site."""
    return f"<details markdown>\n<summary>{summary}</summary>\n\n{text}\n\n</details>"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def grid(names: Iterable[str], columns: Sequence[T], cell: Callable[[str, T], str], corner: str = "selector") -> str:
    """A table with a row for each name."""
    header = [f"{column:g}" if isinstance(column, float) else str(column) for column in columns]
    return table([corner, *header], ([name, *(cell(name, column) for column in columns)] for name in names))


def verdict(where: str, found: Sequence[tuple[str, Difference]]) -> Iterator[str]:
    """Who is surely above capa, and who below, of differences to it."""
    for verb, sure in (("loses to", better), ("beats", worse)):
        if names := [f"{name} by {points(each)}" for name, each in found if sure(each)]:
            yield f"{where} capa {verb} {joined(names)}."


def unsurpassed(wheres: Sequence[str], what: str, than: str) -> Iterator[str]:
    """Yield a sentence on where nobody is surely better."""
    if wheres:
        yield f"At {what}{'s' * (len(wheres) > 1)} {joined(wheres)} no selector is surely better than {than}."
