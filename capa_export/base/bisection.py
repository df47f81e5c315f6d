"""Bisection of a number."""

from collections.abc import Callable

__all__ = ["largest_within"]


def largest_within(most: int, holds: Callable[[int], bool]) -> int:
    """The largest number of 0 to `most` for which something holds, where it holds for all smaller ones.

    Args:
        most: asked first.
        holds: says whether it holds for a number; that it does for 0 is taken for granted.
    """
    if most <= 0 or holds(most):
        return most
    within, beyond = 0, most
    while beyond - within > 1:
        middle = (within + beyond) // 2
        within, beyond = (middle, beyond) if holds(middle) else (within, middle)
    return within
