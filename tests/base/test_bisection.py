"""Bisection finds the bound, and asks few times."""

import pytest

from capa_export.base.bisection import largest_within


@pytest.mark.parametrize("most", [0, 1, 2, 7, 28])
def test_it_finds_every_bound(most: int) -> None:
    for bound in range(most + 1):
        asked = list[int]()

        def holds(number: int, bound: int = bound, asked: list[int] = asked) -> bool:
            asked.append(number)
            return number <= bound

        assert largest_within(most, holds) == bound
        assert asked[:1] == [most][: len(asked)] and len(set(asked)) == len(asked) <= 1 + most.bit_length()
        assert 0 not in asked
