"""Passes through a model that stop before each of its parts, so that several of them can share what a part takes."""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, Protocol, TypeAlias, TypeVar

__all__ = ["RESIDENT", "TOGETHER_BYTES", "Part", "Pass", "WeightSource", "grouped", "run_pass", "together"]

T = TypeVar("T")

TOGETHER_BYTES = 2 << 30
"""Bytes of keys and values up to which prompts go through a streamed model together."""

Part: TypeAlias = int | Literal["tower", "head"]
"""A decoder layer, the vision tower with what else makes the decoder's inputs, or the last norm with the LM head."""

Pass: TypeAlias = Generator[Part, None, T]
"""Work that names the part of the model that it needs next, and goes on when that has its weights."""


class WeightSource(Protocol):
    """Gives each part of a model its weights."""

    def holding(self, model: Any, part: Part) -> AbstractContextManager[object]:
        """The part has its weights until the block ends."""
        ...

    def holding_all(self, model: Any) -> AbstractContextManager[object]:
        """Every part has its weights while it runs, until the block ends: for the model's own forward pass."""
        ...


class _ResidentWeights:
    """Weights that are in memory all the time."""

    def holding(self, model: Any, part: Part) -> AbstractContextManager[object]:  # noqa: ARG002 - there is nothing to do.
        return nullcontext()

    def holding_all(self, model: Any) -> AbstractContextManager[object]:  # noqa: ARG002 - as above.
        return nullcontext()


RESIDENT = _ResidentWeights()


def together(passes: Sequence[Pass[T]]) -> Pass[list[T]]:
    """Join several passes into one that starts them at once: at each part, all that have come to it go on, in order.

    So a pass may read what an earlier one of the list left at the same part: the tokens of an answer that is known
    follow the prompt through the layers, each attending to those before it.
    """
    results: dict[int, T] = {}
    waiting: dict[int, Part] = {}

    def go_on(index: int) -> None:
        try:
            waiting[index] = next(passes[index])
        except StopIteration as stop:
            waiting.pop(index, None)
            results[index] = stop.value

    for index in range(len(passes)):
        go_on(index)
    while waiting:
        part = next(iter(waiting.values()))
        yield part
        for index in [index for index, needed in waiting.items() if needed == part]:
            go_on(index)
    return [results[index] for index in range(len(passes))]


def run_pass(work: Pass[T], holding: Callable[[Part], AbstractContextManager[object]]) -> T:
    """The result of a pass, every part of the model held while it is needed."""
    try:
        part = next(work)
        while True:
            with holding(part):
                part = next(work)
    except StopIteration as stop:
        return stop.value


def grouped(items: Iterable[T], size: Callable[[T], int], limit: int) -> Iterator[list[T]]:
    """The items in groups of at most this size, one at least; with a limit of 0, each as soon as it is there."""
    group: list[T] = []
    held = 0
    for item in items:
        own = size(item)
        if group and held + own > limit:
            yield group
            group, held = [], 0
        group.append(item)
        held += own
        if not limit:
            yield group
            group = []
    if group:
        yield group
